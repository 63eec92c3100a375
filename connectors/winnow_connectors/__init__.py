"""One connector per vendor: object storage, Delta tables and the ledger of runs over them, DuckDB."""

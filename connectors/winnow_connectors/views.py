"""The views: what is current, as SQL of DuckDB over the append-only tables.

Every view shows finished runs only: a row counts when its ``run`` stands in ``runs`` with the status ``finished``.
"""

from __future__ import annotations

_FINISHED = """
finished AS (
    SELECT run_id AS run, max(finished_at) AS run_finished_at FROM runs WHERE status = 'finished' GROUP BY run_id
)"""

_LAST_SEEN = """
seen AS (
    SELECT images.* FROM images SEMI JOIN finished USING (run)
    QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY seen_at DESC, event) = 1
)"""

_CURRENT = "event IN ('added', 'changed')"

_OF_PRODUCTION = """
CASE WHEN p.version IS NULL OR p.version = task || '@base' THEN NOT starts_with(model, task || '@')
    ELSE split_part(model, '+', 1) = p.version END"""
"""Whether an answer is of the version in production, alone or as a mean over views: ``garment@2+mild.1a2b3cx4``."""

_NEWEST_PREDICTION = f"""
newest AS (
    SELECT predictions.* FROM predictions JOIN finished USING (run) LEFT JOIN production AS p USING (task)
    QUALIFY row_number() OVER (
        PARTITION BY image_id, task
        ORDER BY {_OF_PRODUCTION} DESC, run_finished_at DESC, predictions."at" DESC, model
    ) = 1
)"""

_LAST_COMPARED = """
compared AS (
    SELECT task, arg_max(run_id, finished_at) AS run
    FROM (SELECT unnest(tasks) AS task, run_id, finished_at FROM runs WHERE job = 'duplicates' AND status = 'finished')
    GROUP BY task
)"""

_MASKS = """(value LIKE '{"segment_"%' AND value NOT LIKE '%"answer":%')"""
"""Painted masks; not where the person said something of the whole image. (The name of a table would open the table.)"""

_LAST_ACCEPTED = """
last_accepted AS (
    SELECT task, arg_max(run_id, finished_at) AS run
    FROM (SELECT unnest(tasks) AS task, run_id, finished_at FROM runs WHERE job = 'accept' AND status = 'finished')
    GROUP BY task
)"""

VIEWS: dict[str, str] = {
    "current_images": f"""
WITH {_FINISHED}, {_LAST_SEEN}
SELECT * FROM seen WHERE {_CURRENT}
""",
    "latest_outcomes": f"""
WITH {_FINISHED}
SELECT outcomes.* FROM outcomes JOIN finished USING (run)
QUALIFY row_number() OVER (PARTITION BY image_id, task, model ORDER BY run_finished_at DESC, outcomes."at" DESC) = 1
""",
    "failures": f"""
WITH {_FINISHED},
failed AS (SELECT * FROM latest_outcomes WHERE status = 'failed'),
seen AS (
    SELECT images.* FROM images SEMI JOIN failed USING (image_id) SEMI JOIN finished USING (run)
    QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY seen_at DESC, event) = 1
)
SELECT f.image_id, s.uri, f.task, f.model, f.stage, f.error, f.message, f.retryable, f.sha256, f.num_bytes, f.format,
    f.width, f.height, f.run, f."at", coalesce(s.{_CURRENT}, false) AS current
FROM failed AS f LEFT JOIN seen AS s USING (image_id)
""",
    "production": f"""
WITH {_FINISHED}
SELECT m.task, m.version, m.event, m.run, m."at" FROM models AS m SEMI JOIN finished USING (run)
WHERE m.event IN ('promoted', 'rolled_back')
QUALIFY row_number() OVER (PARTITION BY m.task ORDER BY m."at" DESC) = 1
""",
    # Of the version in production, as far as it answered: an evaluation of another one changes nothing that is shown.
    "latest_predictions": f"""
WITH {_FINISHED}, {_LAST_SEEN}, {_NEWEST_PREDICTION}
SELECT n.image_id, s.uri, n.task, n.model, n.label, n.confidence, n.margin, n.entropy, n.top5, n.probabilities,
    n.classes, n.disagreement, n.run, n."at", coalesce(s.{_CURRENT}, false) AS current
FROM newest AS n LEFT JOIN seen AS s USING (image_id)
""",
    # All rows of one answer: rank, not row_number.
    "latest_segments": f"""
WITH {_FINISHED}, {_LAST_SEEN},
newest AS (
    SELECT segments.* FROM segments JOIN finished USING (run) LEFT JOIN production AS p USING (task)
    QUALIFY rank() OVER (
        PARTITION BY image_id, task
        ORDER BY {_OF_PRODUCTION} DESC, run_finished_at DESC, segments."at" DESC, model
    ) = 1
)
SELECT n.image_id, s.uri, n.task, n.model, n.label, n.area_share, n.confidence, n.entropy, n.disagreement, n.box, n.rle,
    n.run, n."at", coalesce(s.{_CURRENT}, false) AS current
FROM newest AS n LEFT JOIN seen AS s USING (image_id)
""",
    "duplicate_groups": f"""
WITH {_FINISHED}, {_LAST_SEEN}, {_LAST_COMPARED}
SELECT d.group_id, d.image_id, s.uri, s.split, d.task, d.model, d.kind, d.representative, d.similarity, d.hamming,
    d.num_images, d.run, d."at", coalesce(s.{_CURRENT}, false) AS current
FROM duplicates AS d SEMI JOIN compared USING (task, run) LEFT JOIN seen AS s USING (image_id)
""",
    "outliers": f"""
WITH {_FINISHED}, {_LAST_SEEN}, {_LAST_COMPARED}
SELECT n.image_id, s.uri, s.split, n.task, n.model, n.outlier_score, n.k, n.nearest, n.similarity, n.run, n."at",
    coalesce(s.{_CURRENT}, false) AS current
FROM neighbours AS n SEMI JOIN compared USING (task, run) LEFT JOIN seen AS s USING (image_id)
""",
    # In one place for training, selection and SQL: of a picture that lies in several splits the earlier ones are lost.
    "quarantined": f"""
WITH {_FINISHED}, {_LAST_SEEN}, {_LAST_COMPARED},
sides AS (
    SELECT d.task, d.group_id, image_id,
        CASE WHEN s.audit OR s.split = 'test' THEN 2 WHEN s.split = 'val' THEN 1 ELSE 0 END AS side
    FROM duplicates AS d SEMI JOIN compared USING (task, run) JOIN seen AS s USING (image_id)
    WHERE s.{_CURRENT}
),
leaking AS (
    SELECT task, group_id, image_id, if(max(side) OVER same = 2, 'test', 'val') AS leaks_into FROM sides
    WINDOW same AS (PARTITION BY task, group_id)
    QUALIFY side < max(side) OVER same
)
SELECT s.image_id, s.uri, s.split, l.task, l.group_id, l.leaks_into
FROM leaking AS l JOIN seen AS s ON l.image_id = coalesce(s.parent, s.image_id) WHERE s.{_CURRENT}
""",
    # Of two events at one time the deletion is the last.
    "annotations": f"""
WITH {_FINISHED}
SELECT labels.*, run_finished_at FROM labels JOIN finished USING (run) WHERE origin = 'label_studio'
QUALIFY row_number() OVER (
    PARTITION BY server, project, annotation_id
    ORDER BY updated_at DESC, event IN ('deleted', 'skipped') DESC, event = 'changed' DESC, run_finished_at DESC
) = 1
""",
    # Of each person the last answer counts. What most people said is the label, by the last who said so; where several
    # answers are ahead together there is none. Masks are one answer: their pixels are put to the vote by `winnow review
    # pull`, which adds a consensus.
    "current_labels": f"""
WITH {_FINISHED},
events AS (SELECT labels.*, run_finished_at FROM labels JOIN finished USING (run)),
votes AS (
    SELECT *, CASE WHEN {_MASKS} THEN 'masks' ELSE concat_ws('|', label, value) END AS answer
    FROM annotations WHERE event NOT IN ('deleted', 'skipped')
    QUALIFY row_number() OVER (
        PARTITION BY image_id, task, coalesce(annotator, annotation_id::VARCHAR)
        ORDER BY updated_at DESC, run_finished_at DESC, annotation_id DESC
    ) = 1
),
counted AS (SELECT *, count(*) OVER (PARTITION BY image_id, task, answer) AS num_votes FROM votes),
ahead AS (SELECT * FROM counted QUALIFY num_votes = max(num_votes) OVER (PARTITION BY image_id, task)),
agreed AS (
    SELECT * EXCLUDE (answer, num_votes) FROM ahead
    QUALIFY min(answer) OVER (PARTITION BY image_id, task) = max(answer) OVER (PARTITION BY image_id, task)
),
joint AS (
    SELECT * FROM events WHERE origin = 'consensus'
    QUALIFY row_number() OVER (PARTITION BY image_id, task ORDER BY updated_at DESC, run_finished_at DESC) = 1
),
valid AS (
    SELECT *, if({_MASKS}, 1, 0) AS masks, 1 AS precedence FROM agreed
    UNION ALL
    SELECT j.*, 1, 2 FROM joint AS j WHERE event != 'deleted'
    UNION ALL
    SELECT *, 0, 0 FROM events WHERE origin = 'imported'
)
SELECT * EXCLUDE (run_finished_at, masks, precedence) FROM valid
QUALIFY row_number() OVER (
    PARTITION BY image_id, task
    ORDER BY precedence = 1 AND masks = 0 DESC, precedence DESC, updated_at DESC, run_finished_at DESC,
        annotation_id DESC
) = 1
""",
    # A skip is an answer too. An annotation of an earlier round is none: ties come back as a new round.
    "queue_waiting": f"""
WITH {_FINISHED}, {_LAST_SEEN},
answered AS (
    SELECT image_id, task, max(coalesce(round, 2147483647)) AS round FROM annotations WHERE event != 'deleted'
    GROUP BY image_id, task
)
SELECT q.image_id, s.uri, q.task, q.round, q.model, q.reason, q.score, q.rank, q.policy, q.audit, q.run, q."at",
    coalesce(s.{_CURRENT}, false) AS current
FROM queue AS q SEMI JOIN finished USING (run) LEFT JOIN seen AS s USING (image_id)
WHERE NOT EXISTS (FROM answered AS a WHERE a.image_id = q.image_id AND a.task = q.task AND a.round >= q.round)
""",
    "model_versions": f"""
WITH {_FINISHED},
events AS (SELECT models.* FROM models SEMI JOIN finished USING (run)),
measured AS (
    SELECT task, version, arg_max(metrics, "at") AS metrics FROM events
    WHERE event IN ('made', 'measured') AND metrics IS NOT NULL GROUP BY task, version
)
SELECT e.task, e.version, e.location, e.sha256, m.metrics, e.detail, e.run, e."at",
    EXISTS (FROM production AS p WHERE p.task = e.task AND p.version = e.version) AS production
FROM events AS e LEFT JOIN measured AS m USING (task, version) WHERE e.event = 'made'
""",
    "results": f"""
WITH {_FINISHED}, {_LAST_SEEN}, {_NEWEST_PREDICTION}, {_LAST_ACCEPTED},
chosen AS (
    SELECT accepted.* FROM accepted SEMI JOIN last_accepted USING (task, run)
    QUALIFY row_number() OVER (PARTITION BY image_id, task ORDER BY accepted."at" DESC) = 1
),
of_chosen AS (
    SELECT predictions.* FROM predictions SEMI JOIN chosen USING (image_id, task, model) JOIN finished USING (run)
    QUALIFY row_number() OVER (
        PARTITION BY image_id, task, model ORDER BY run_finished_at DESC, predictions."at" DESC
    ) = 1
),
decided AS (
    SELECT image_id, task, label, if(origin = 'label_studio', 'person', 'imported') AS source,
        NULL::FLOAT AS confidence, NULL::VARCHAR AS model, updated_at AS "at", 1 AS precedence
    FROM current_labels WHERE label IS NOT NULL
    UNION ALL
    SELECT c.image_id, c.task, coalesce(c.label, p.label), 'accepted', p.confidence, c.model, c."at", 2
    FROM chosen AS c LEFT JOIN of_chosen AS p USING (image_id, task, model)
    WHERE coalesce(c.label, p.label) IS NOT NULL
),
answers AS (
    SELECT * EXCLUDE precedence FROM decided
    QUALIFY row_number() OVER (PARTITION BY image_id, task ORDER BY precedence) = 1
    UNION ALL
    SELECT image_id, task, label, 'prediction', confidence, model, "at"
    FROM newest ANTI JOIN decided USING (image_id, task)
)
SELECT a.image_id, s.uri, s.split, a.task, a.label, a.source, a.confidence, a.model, a."at"
FROM answers AS a JOIN seen AS s USING (image_id) WHERE s.{_CURRENT}
""",
}
"""SQL of every view by name; a view may use tables and the views before it."""

"""The files of ``infra/`` against the schemas of the programs that read them. No container engine runs here.

Each checker is also shown a wrong copy, so that a checker that accepts everything is noticed.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERNETES = "1.33"
"""The release of Kubernetes whose schemas are asked."""

Document = dict[str, Any]


def documents() -> list[Document]:
    """Every resource of ``infra/kuberay``."""
    found = [doc for file in sorted((INFRA / "kuberay").glob("*.yaml")) for doc in yaml.safe_load_all(file.read_text())]
    assert len(found) > 10
    return found


DOCUMENTS = documents()
RAY = [doc for doc in DOCUMENTS if doc["apiVersion"].startswith("ray.io/")]
CORE = [doc for doc in DOCUMENTS if doc not in RAY]


def of_kind(kind: str) -> Document:
    """A copy of the only resource of that kind."""
    (found,) = (doc for doc in DOCUMENTS if doc["kind"] == kind)
    return copy.deepcopy(found)


def name_of(doc: Document) -> str:
    return f"{doc['kind']}-{doc['metadata'].get('name') or doc['metadata']['generateName']}"


def pods() -> dict[str, Document]:
    """Every pod's specification, by what makes it."""
    cluster = of_kind("RayCluster")["spec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    nightly = of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return {"head": cluster["headGroupSpec"]["template"]["spec"], "round": nightly, **workers}


# ----------------------------------------------------------------------------------------------------------- Kubernetes


def check_core(doc: Document) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra dev")
    kubernetes_validate.validate(doc, KUBERNETES, strict=True)


@pytest.mark.parametrize("doc", CORE, ids=name_of)
def test_resources_of_kubernetes_fit_its_schemas(doc: Document) -> None:
    check_core(doc)


def test_a_wrong_resource_of_kubernetes_is_found() -> None:
    wrong = of_kind("CronJob")
    wrong["spec"]["jobTemplate"]["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(Exception, match="container"):
        check_core(wrong)


@pytest.fixture(scope="module")
def check_ray(shared_data: Path) -> Callable[[Document], None]:
    """KubeRay's own schemas; as ``kubectl --validate=strict``, they refuse fields that they do not know."""
    folder = shared_data / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"needs the CustomResourceDefinitions of KubeRay, which are not at {folder}")
    schemas: dict[tuple[str, str], Document] = {}
    for file in folder.glob("ray.io_*.yaml"):
        definition = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]  # 2 MB: C, not Python
        for version in definition["versions"]:
            key = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            schemas[key] = strict(version["schema"]["openAPIV3Schema"])
            schemas[key]["properties"]["metadata"] = {"type": "object"}

    def check(doc: Document) -> None:
        # Their message alone: an error as a whole prints the schema, which takes minutes.
        errors = jsonschema.Draft7Validator(schemas[doc["apiVersion"], doc["kind"]]).iter_errors(doc)
        assert [error.message for error in errors] == []

    return check


def strict(schema: Any) -> Any:
    """A structural schema as Kubernetes means it, in JSON Schema's words."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    told = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        told["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        told["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return told


@pytest.mark.parametrize("doc", RAY, ids=name_of)
def test_resources_of_kuberay_fit_its_schemas(doc: Document, check_ray: Callable[[Document], None]) -> None:
    check_ray(doc)


def test_a_wrong_resource_of_kuberay_is_found(check_ray: Callable[[Document], None]) -> None:
    unknown, mistyped, deep = (of_kind("RayCluster") for _ in range(3))
    unknown["spec"]["workerGroupSpec"] = []
    mistyped["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    deep["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    for wrong, name in ((unknown, "workerGroupSpec"), (mistyped, "'8'"), (deep, "volumeMount")):
        with pytest.raises(AssertionError, match=name):
            check_ray(wrong)
    job = of_kind("RayJob")
    job["spec"]["entryPoint"] = job["spec"].pop("entrypoint")
    with pytest.raises(AssertionError, match="entryPoint"):
        check_ray(job)


@pytest.mark.parametrize("name", pods())
def test_pods_are_locked_in(name: str) -> None:
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]) & set(container["resources"]["requests"])


def test_secrets_stand_nowhere() -> None:
    assert [name_of(doc) for doc in DOCUMENTS if doc["kind"] == "Secret"] == []
    for pod in pods().values():
        for entry in (entry for container in pod["containers"] for entry in container["env"]):
            secret = any(word in entry["name"] for word in ("TOKEN", "SECRET", "KEY", "PASSWORD"))
            assert not secret or set(entry) == {"name", "valueFrom"}, entry["name"]


def test_the_cluster_has_the_ray_of_the_constraints() -> None:
    assert f"\nray=={of_kind('RayCluster')['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_names_fit_together() -> None:
    cluster = of_kind("RayCluster")["metadata"]
    assert of_kind("RayJob")["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["name"]}
    assert {doc["metadata"].get("namespace", "winnow") for doc in DOCUMENTS} == {cluster["namespace"]}
    accounts = {doc["metadata"]["name"] for doc in DOCUMENTS if doc["kind"] == "ServiceAccount"}
    assert {pod["serviceAccountName"] for pod in pods().values()} == accounts
    submit = pods()["round"]["containers"][0]["command"]
    assert f"--address=http://{cluster['name']}-head-svc:8265" in submit
    assert f"/etc/winnow/{submit[-1].rpartition('/')[2]}" == submit[-1]
    assert submit[-1].rpartition("/")[2] in of_kind("ConfigMap")["data"]


def test_the_configurations_are_valid(tmp_path: Path) -> None:
    from winnow.config import load_config

    inside = tmp_path / "winnow.toml"
    inside.write_text(of_kind("ConfigMap")["data"]["winnow.toml"])
    for path in (inside, INFRA / "winnow.toml"):
        assert load_config(path).task("objects").kind == "classification"


def test_the_nightly_round_calls_commands_that_exist() -> None:
    from click.testing import CliRunner

    from winnow_jobs.cli.main import cli

    script = of_kind("ConfigMap")["data"]["round.sh"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
    calls = [line.split()[1:] for line in script.splitlines() if line.startswith("winnow ")]
    assert len(calls) == 5
    for call in calls:
        # With --help at its end click reads the whole call, and refuses options that it does not know.
        done = CliRunner().invoke(cli, [*call, "--help"])
        assert done.exit_code == 0, done.output
        options = [word for word in call if word.startswith("--")]
        assert all(option in done.output for option in options)


# -------------------------------------------------------------------------------------------------------------- compose


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("check_jsonschema", reason="needs the extra dev")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_compose_file_fits_its_schema() -> None:
    done = check_compose(INFRA / "compose.yaml")
    assert done.returncode == 0, done.stdout


def test_a_wrong_compose_file_is_found(tmp_path: Path) -> None:
    wrong = yaml.safe_load((INFRA / "compose.yaml").read_text())
    wrong["services"]["s3"]["port"] = wrong["services"]["s3"].pop("ports")
    path = tmp_path / "compose.yaml"
    path.write_text(yaml.safe_dump(wrong))
    done = check_compose(path)
    assert done.returncode == 1
    assert "'port' was unexpected" in done.stdout


def test_services_are_locked_in() -> None:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert service["user"].split(":")[0] not in ("0", "root"), name
        assert service["cap_drop"] == ["ALL"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert service["healthcheck"]["test"], name
        assert {volume.split(":")[0] for volume in service["volumes"] if volume[0] != "."} <= set(compose["volumes"])


def test_every_secret_of_the_compose_file_is_asked_for_and_none_is_given() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (INFRA / "compose.yaml").read_text()))
    lines = [line for line in (INFRA / "example.env").read_text().splitlines() if line and line[0] != "#"]
    example = dict(line.split("=", 1) for line in lines)
    assert asked == set(example)
    assert {name for name, value in example.items() if value} == {"AWS_ACCESS_KEY_ID", "LABEL_STUDIO_USERNAME"}
    ignored = subprocess.run(["git", "check-ignore", "-q", "infra/.env"], cwd=ROOT, timeout=20, check=False)
    assert ignored.returncode == (0 if (ROOT / ".git").exists() else 128)


# ------------------------------------------------------------------------------------------------------------ the image


def lint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint, of the extra dev")
    command = [str(hadolint), "--no-color", "-"]
    return subprocess.run(command, input=dockerfile, capture_output=True, text=True, timeout=60, check=False)


def test_the_dockerfile_passes_the_linter() -> None:
    done = lint((INFRA / "Dockerfile").read_text())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        ("-slim-bookworm AS base", " AS base\nFROM python:latest", "DL3007"),
        ("--constraint constraints.txt hatchling", "hatchling", "DL3013"),
        ('"$@"', "$@", "SC2068"),
    ],
)
def test_a_wrong_dockerfile_is_found(right: str, wrong: str, rule: str) -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert right in text
    done = lint(text.replace(right, wrong))
    assert done.returncode == 1
    assert rule in done.stdout


def test_the_image_gets_every_file_that_the_build_copies() -> None:
    shown = [line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        name
        for line in (INFRA / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    ]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(entry == name or entry.startswith(f"{name}/") for entry in shown), name


def test_volumes_of_the_image_belong_to_its_user() -> None:
    """A new volume takes the owner of the folder below it; where there is none, root owns it."""
    made = re.search(r"chown winnow:winnow ([^\n]+)", (INFRA / "Dockerfile").read_text())
    assert made is not None
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    mounted = {
        path.split(":")[1]
        for name in ("ray-head", "ray-worker", "s3")
        for path in services[name]["volumes"]
        if not path.startswith("./")
    }
    assert mounted == set(made[1].split())


def test_what_the_image_installs_first_is_what_winnow_and_its_extras_need() -> None:
    command = [sys.executable, INFRA / "requirements.py", ROOT / "pyproject.toml", "aws", "local", "timm"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) < set(listed)
    assert any(line.startswith("ray[data,default]") for line in listed)
    assert not [line for line in listed if line.startswith("winnow")]

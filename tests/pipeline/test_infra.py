"""The files of ``infra/`` suit Ray, Kubernetes and S3, and grant no more than is needed."""

import ast
import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
import yaml
from kubernetes.client import V1NetworkPolicy, V1ObjectMeta, V1PodTemplateSpec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from pipeline.cluster import TLS_FILES

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
CLUSTERS = ["local", "aws", "gcp"]
MANIFESTS = ["raycluster", "rayjob"]
SCHEMA = json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())


def read(name: str) -> Any:
    return yaml.safe_load((INFRA / f"{name}.yaml").read_text())


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with one place of it replaced."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


# --- ray up ---------------------------------------------------------------------------------------


def check_cluster(config: Any) -> None:
    """What `ray up` checks before it contacts anything. Raises jsonschema.ValidationError."""
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_a_cluster_file(name: str) -> None:
    check_cluster(read(name))


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("num_workers",), 2),
        (("head_start_ray_commands",), "ray start --head"),
        (("auth", "user"), "root"),
        (("cluster_name",), 1),
    ],
)
def test_ray_refuses_it_with_a_mistake_in_it(name: str, path: tuple[Any, ...], new: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check_cluster(changed(read(name), path, new))


@pytest.mark.parametrize("name", CLUSTERS)
def test_hosts_want_a_token_and_keep_the_dashboard_to_themselves(name: str) -> None:
    config = read(name)
    for kind in ("head", "worker"):
        for command in config[f"{kind}_start_ray_commands"]:
            assert command.startswith("source ~/vlae-pipeline/infra/environment.sh && ")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "export RAY_AUTH_MODE=token" in (INFRA / "environment.sh").read_text()


def test_hosts_use_tls_if_and_only_if_they_have_a_key(tmp_path: Path) -> None:
    command = ["bash", "-c", f"source {INFRA}/environment.sh && env"]
    (tmp_path / ".ray").mkdir()

    def variables() -> dict[str, str]:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        lines = [
            line for line in done.stdout.splitlines() if line.startswith(("RAY_USE", "RAY_TLS"))
        ]
        return dict(line.split("=", 1) for line in lines)

    assert variables() == {}
    (tmp_path / ".ray/tls.key").touch()
    found = variables()
    assert found.pop("RAY_USE_TLS") == "1"
    commented = re.findall(
        r"# (~/\.ray/tls\S+): \1$", (INFRA / "local.yaml").read_text(), re.MULTILINE
    )
    assert {path.replace("~", str(tmp_path)) for path in commented} == set(found.values())
    assert set(found) == set(TLS_FILES)
    mounts = read("local")["file_mounts"] | dict(zip(commented, commented, strict=True))
    check_cluster(read("local") | {"file_mounts": mounts})


def test_the_clouds_differ_from_plain_hosts_only_in_how_hosts_are_made() -> None:
    local = read("local")
    for name in ("aws", "gcp"):
        other = read(name)
        for key in ("file_mounts", "rsync_filter", "setup_commands", "worker_start_ray_commands"):
            assert other[key] == local[key], f"{name}: {key}"


def test_a_host_on_compute_engine_may_do_no_more_than_it_must() -> None:
    types = read("gcp")["available_node_types"]
    # Ray gives the head, and only the head, an account with scopes for the whole platform, unless
    # the file names one. The Compute API gives a host without an account none.
    (account,) = types["head"]["node_config"]["serviceAccounts"]
    assert account["scopes"] == ["https://www.googleapis.com/auth/compute"]
    assert types["worker"]["node_config"]["serviceAccounts"] == []
    docs = " ".join((ROOT / "docs/cluster.md").read_text().split())
    name, _, project = account["email"].partition("@")
    assert f"gcloud iam service-accounts create {name} " in docs
    assert project == f"{read('gcp')['provider']['project_id']}.iam.gserviceaccount.com"


# --- Kubernetes -----------------------------------------------------------------------------------


def groups(manifest: Any) -> list[Any]:
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def check_manifest(manifest: Any) -> None:
    """Hold a manifest to KubeRay's schema and its pods to Kubernetes' own types, unknown fields
    refused.
    """
    jsonschema.validate(manifest, SCHEMA)
    strict = {"strict": True, "extra": "forbid", "by_alias": True, "by_name": False}
    V1ObjectMeta.model_validate(manifest["metadata"], **strict)
    for group in groups(manifest):
        V1PodTemplateSpec.model_validate(group["template"], **strict)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_and_kubernetes_take_a_manifest(name: str) -> None:
    check_manifest(read(name))


POD = ("headGroupSpec", "template", "spec")


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("headGroupSpec", "replicas"), 1),
        (("authOptions", "mode"), "on"),
        (("workerGroupSpecs", 0, "minReplicas"), "1"),
        ((*POD, "serviceAccount_name"), "vlae"),
        ((*POD, "containers", 0, "image"), 3),
        ((*POD, "containers", 0, "name"), None),
        ((*POD, "containers", 0, "resources", "limits", "cpu"), 2),
        ((*POD, "containers", 0, "ports", 0, "containerPort"), "6379"),
        ((*POD, "securityContext", "runAsNonRoot"), "true"),
    ],
)
def test_a_manifest_with_a_mistake_in_it_is_refused(path: tuple[Any, ...], new: Any) -> None:
    with pytest.raises((jsonschema.ValidationError, pydantic.ValidationError)):
        check_manifest(changed(read("raycluster"), ("spec", *path), new))


def test_the_job_has_the_cluster_of_the_cluster_manifest() -> None:
    assert read("rayjob")["spec"]["rayClusterSpec"] == read("raycluster")["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_want_a_token_and_run_without_privileges(name: str) -> None:
    manifest = read(name)
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in groups(manifest):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert container["resources"]["limits"] == container["resources"]["requests"]
            # Everything that Ray, Python and this project write without being told where.
            written = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert written.keys() == {"/tmp", "/dev/shm"}
            assert set(written.values()) == {volume["name"] for volume in pod["volumes"]}
            assert all("emptyDir" in volume for volume in pod["volumes"])
            assert container["workingDir"] == "/tmp"
            assert {"name": "HOME", "value": "/tmp"} in container["env"]


def admits(rule: Any, labels: dict[str, str], port: int, end: str) -> bool:
    """Whether a rule of a network policy admits pods with ``labels`` at its ``end``."""
    ports = [each["port"] for each in rule.get("ports", [])]
    if ports and port not in ports:
        return False
    for peer in rule[end]:
        selector = peer.get("podSelector", {})
        wanted = selector.get("matchLabels", {}).items()
        keys = {each["key"] for each in selector.get("matchExpressions", [])}
        if selector and wanted <= labels.items() and keys <= labels.keys():
            return True
    return False


def test_pods_talk_to_each_other_the_operator_names_and_https_and_to_nothing_else() -> None:
    policy = read("network-policy")
    V1NetworkPolicy.model_validate(policy, strict=True, extra="forbid", by_alias=True)
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    node = {"ray.io/is-ray-node": "yes", "ray.io/cluster": "vlae"}
    assert spec["podSelector"]["matchLabels"].items() <= node.items()
    operator, other = {"app.kubernetes.io/name": "kuberay-operator"}, {"app": "shop"}
    submitter = {"batch.kubernetes.io/job-name": "vlae-train-x"}
    for labels, port, passes in (
        (node, 10002, True),
        (operator, 8265, True),
        (operator, 6379, False),
        (submitter, 8265, True),
        (submitter, 6379, False),
        (other, 8265, False),
    ):
        assert any(admits(rule, labels, port, "from") for rule in spec["ingress"]) is passes
    for labels, port, passes in (
        (node, 10002, True),
        ({"k8s-app": "kube-dns"}, 53, True),
        ({"k8s-app": "kube-dns"}, 443, False),
        (other, 443, False),
    ):
        assert any(admits(rule, labels, port, "to") for rule in spec["egress"]) is passes
    (outside,) = (rule for rule in spec["egress"] if "ipBlock" in rule["to"][0])
    assert outside["ports"] == [{"port": 443, "protocol": "TCP"}]
    assert "169.254.0.0/16" in outside["to"][0]["ipBlock"]["except"]


def test_manifests_and_image_have_the_installed_version_of_ray() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert read("raycluster")["spec"]["rayVersion"] == pinned[1]


def test_the_image_is_pinned_does_not_run_as_root_and_copies_what_is_there() -> None:
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    base = next(words[1] for words in instructions if words[0] == "FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    users = [words[1] for words in instructions if words[0] == "USER"]
    assert users == ["1000"]
    copied = [source for words in instructions if words[0] == "COPY" for source in words[2:-1]]
    assert copied
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        name.partition(".")[0]
        for name in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    assert packages
    assert packages <= set(copied)


# --- storage --------------------------------------------------------------------------------------

PERMISSIONS = {
    "get_object": {"s3:GetObject"},
    "head_object": {"s3:GetObject"},
    "put_object": {"s3:PutObject"},
    "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "list_objects_v2": {
        "s3:ListBucket"
    },  # without it, an object that is not there looks like one that is forbidden
    "delete_objects": {"s3:DeleteObject"},
}
"""What S3 asks of a caller, by the methods of boto3's client, after its service authorization
reference.
"""


def methods_called() -> set[str]:
    """The methods of S3's client that ``pipeline.storage.s3`` calls."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "pipeline/storage/s3.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = ast.unparse(node.func.value)
            if of in ("self._s3", "client"):
                found.add(
                    ast.literal_eval(node.args[0])
                    if node.func.attr == "get_paginator"
                    else node.func.attr
                )
    return found


def test_the_s3_policy_allows_what_the_code_does_and_nothing_else() -> None:
    policy = json.loads((INFRA / "s3-policy.json").read_text())
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    assert allowed == set().union(*(PERMISSIONS[method] for method in methods_called()))
    assert all(statement["Effect"] == "Allow" for statement in policy["Statement"])
    for statement in policy["Statement"]:
        below = "" if statement["Action"] == ["s3:ListBucket"] else "/YOUR-PREFIX/*"
        assert statement["Resource"] == [f"arn:aws:s3:::YOUR-BUCKET{below}"]


def test_no_file_of_infra_holds_a_secret() -> None:
    for path in INFRA.iterdir():
        text = path.read_text()
        assert not re.search(
            r"(SECRET_ACCESS_KEY|RAY_AUTH_TOKEN|PASSWORD)\w*['\"]?\s*[:=]\s*\S", text
        ), path
        assert not re.search(
            r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|BEGIN .*PRIVATE KEY|(?<!sha256:)\b[0-9a-f]{40,}\b",
            text,
        ), path


# --- jobs -----------------------------------------------------------------------------------------


def test_ray_takes_what_goes_with_a_job() -> None:
    environment = RuntimeEnv(**read("job"))
    assert environment.env_vars().keys() == {"AWS_REGION"}
    with pytest.raises(TypeError):
        RuntimeEnv(**changed(read("job"), ("env_vars", "AWS_REGION"), 1))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout in which people have worked: there is a virtual environment, a
    history, a demo and a cache.
    """
    copied = tmp_path / "checkout"
    shutil.copytree(
        ROOT,
        copied,
        symlinks=True,
        ignore=shutil.ignore_patterns(".venv", ".git", "demo", "outputs", "__pycache__"),
    )
    for place in (
        ".venv/torch.so",
        ".git/pack",
        "demo/model",
        "vlae-store/shard.tar",
        "vlae/__pycache__/made.pyc",
    ):
        (copied / place).parent.mkdir(parents=True, exist_ok=True)
        (copied / place).write_bytes(bytes(1_000_000))
    return copied


def test_a_job_uploads_the_code_and_its_configuration_only(checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(
        str(checkout), package, include_gitignore=True
    )  # what `ray job submit --working-dir` calls
    with zipfile.ZipFile(package) as file:
        files = {item.filename: item.file_size for item in file.infolist() if not item.is_dir()}
    assert {name.partition("/")[0] for name in files if "/" in name} == {
        "vlae",
        "pipeline",
        "configs",
        "infra",
    }
    assert "pipeline/commands/models/train.py" in files
    assert not any("__pycache__" in name for name in files)
    models = [size for name, size in files.items() if name.startswith("vlae/pretrained/")]
    assert sum(models) < 24_000_000
    assert sum(files.values()) - sum(models) < 2_000_000


def test_the_files_of_infra_are_all_accounted_for() -> None:
    documents = (ROOT / "docs/cluster.md").read_text()
    for path in INFRA.iterdir():
        assert path.name in documents, path


# --- dependencies ---------------------------------------------------------------------------------

PINNED = re.compile(
    r"^([\w.-]+)==(\S+)(?: ; [^\n\\]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE
)


def pinned(*parts: str) -> dict[str, tuple[str, str]]:
    """The version and the hashes of each pinned package; every line has to be part of one."""
    found: dict[str, tuple[str, str]] = {}
    for part in parts:
        text = (ROOT / f"constraints{part}.txt").read_text()
        assert not re.sub(r"^#.*", "", PINNED.sub("", text), flags=re.MULTILINE).strip()
        for name, version, hashes in PINNED.findall(text):
            assert name not in found, "pinned twice"
            found[name] = (version, hashes)
    return found


def requirements(words: list[str]) -> list[Requirement]:
    return [
        each
        for each in map(Requirement, words)
        if each.name != "vlae-pipeline" and (not each.marker or each.marker.evaluate())
    ]


def test_every_dependency_is_pinned_with_hashes_at_a_version_that_the_project_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [word for words in project["optional-dependencies"].values() for word in words]
    run, everything = pinned("-build", ""), pinned("-build", "", "-dev", "-cuda")
    for names, chosen in ((project["dependencies"], run), (extras, everything)):
        for each in requirements(names):
            version, _ = chosen[canonicalize_name(each.name)]
            assert each.specifier.contains(version), each


def test_pytorch_may_be_either_of_its_builds() -> None:
    version, hashes = pinned("")["torch"]
    assert version == "2.13.0"
    # The CPU build for Python 3.11 on x86-64, and the one with CUDA on the package index.
    for start in ("6746dbcbeb526eb6", "60fcdcb2f3876e21"):
        assert f"sha256:{start}" in hashes


def test_what_is_installed_here_is_what_is_pinned() -> None:
    for name, (version, _) in pinned("-build", "", "-dev").items():
        with contextlib.suppress(metadata.PackageNotFoundError):  # one for another system
            assert Version(metadata.version(name)).public == version, name


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("raise SystemExit('was run')")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'evil'\nversion = '1'\n")
    with tarfile.open(tmp_path / "evil-1.tar.gz", "w:gz") as file:
        for path in ("setup.py", "pyproject.toml"):
            file.add(tmp_path / path, f"evil-1/{path}")
    listed = tmp_path / "constraints.txt"
    listed.write_text(f"evil==1 \\\n    --hash=sha256:{'0' * 64}\n")
    words = (ROOT / "Makefile").read_text().partition("INSTALL = $(BIN)/pip ")[2].splitlines()[0]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", *words.split(), "--dry-run", "--no-index"),
            *("--find-links", str(tmp_path), "-r", str(listed)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "was run" not in done.stderr

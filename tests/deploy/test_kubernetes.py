"""deploy/kubernetes: valid manifests that hold the rules of a restricted namespace.

KubeRay's schemas lie in a folder beside the checkout; without it, or without `kubectl`, the tests
that need them are skipped.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
KUSTOMIZATIONS = ["services", "cluster", "jobs/train", "jobs/tune", "jobs/evaluate"]
KUBERNETES = "1.32"

Manifest = dict[str, Any]


@cache
def build(name: str) -> list[Manifest]:
    """The manifests that `kubectl apply -k` would send."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here")
    command = [kubectl, "kustomize", str(FOLDER / name)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert not built.stderr, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The pod templates in a manifest, each with where it is."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Manifest]]:
        if isinstance(value, dict):
            if "containers" in value:
                yield path, value
            for key, each in value.items():
                yield from walk(each, f"{path}.{key}")
        elif isinstance(value, list):
            for index, each in enumerate(value):
                yield from walk(each, f"{path}[{index}]")

    yield from walk(manifest, f"{manifest['kind']} {manifest['metadata']['name']}")


def all_pods() -> list[tuple[str, Manifest]]:
    return [pod for name in KUSTOMIZATIONS for each in build(name) for pod in pods(each)]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def strict(schema: Any) -> Any:
    """The schema, with fields that it doesn't name refused, and Kubernetes' own types."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        made.setdefault("additionalProperties", False)
    return made


@cache
def kuberay_schemas() -> dict[tuple[str, str], Manifest]:
    if not SCHEMAS.is_dir():
        pytest.skip("KubeRay's schemas are not here")
    schemas = {}
    for file in sorted(SCHEMAS.glob("*.yaml")):
        definition = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]  # 20 times faster
        for version in definition["versions"]:
            kind = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            schemas[kind] = schema
    return schemas


def validate(manifest: Manifest) -> None:
    """Raises `jsonschema.ValidationError`."""
    import jsonschema
    import kubernetes_validate

    kind = (manifest["apiVersion"], manifest["kind"])
    if kind[0].startswith("ray.io/"):
        jsonschema.validate(manifest, kuberay_schemas()[kind])
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_manifest_is_valid(name: str) -> None:
    manifests = build(name)
    assert manifests
    for manifest in manifests:
        if manifest["kind"] == "RayJob":  # its cluster's spec is that of `cluster`
            rest = {k: v for k, v in manifest["spec"].items() if k != "rayClusterSpec"}
            manifest = {**manifest, "spec": rest}
        validate(manifest)
        assert "namespace" in manifest["metadata"] or manifest["kind"] == "Namespace"


@pytest.mark.slow
def test_a_misspelled_field_is_found() -> None:
    import jsonschema

    (cluster,) = build("cluster")
    wrong = {**cluster, "spec": {**cluster["spec"], "rayVersoin": "2.60.0"}}
    with pytest.raises(jsonschema.ValidationError, match="rayVersoin"):
        validate(wrong)
    service = next(each for each in build("services") if each["kind"] == "Service")
    with pytest.raises(jsonschema.ValidationError, match="prots"):
        validate({**service, "spec": {**service["spec"], "prots": []}})


@pytest.mark.slow
def test_pods_are_restricted() -> None:
    for where, pod in all_pods():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, where
        assert security["runAsUser"] >= 999, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for volume in pod.get("volumes", []):
            assert not {"hostPath", "nfs"} & set(volume), where
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["readOnlyRootFilesystem"] is True, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), where
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where


@pytest.mark.slow
def test_only_the_head_may_call_kubernetes() -> None:
    tokens = [w for w, pod in all_pods() if pod.get("automountServiceAccountToken", True)]
    assert tokens
    assert all("headGroupSpec" in where for where in tokens), tokens


def test_lasting_pods_have_probes() -> None:
    for where, pod in all_pods():
        if "submitterPodTemplate" in where or where.startswith("Job "):
            continue
        for container in pod["containers"]:
            probes = {"startupProbe", "readinessProbe", "livenessProbe"}
            assert probes <= set(container), where


def test_secrets_are_references() -> None:
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")
    for where, pod in all_pods():
        for container in containers(pod):
            for variable in container.get("env", []):
                if secret.search(variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "tessera", where
            assert not secret.search(shlex.join(container.get("command", []))), where
    for name in KUSTOMIZATIONS:
        assert not [each for each in build(name) if each["kind"] == "Secret"]
    settings = (FOLDER / "services" / "settings.env").read_text()
    assert not secret.search(settings)


def test_secrets_have_the_names_that_the_script_makes() -> None:
    """One folder of secrets serves Compose and Kubernetes."""
    script = (ROOT / "deploy" / "docker" / "make-secrets.sh").read_text()
    (names,) = re.findall(r"for name in (.*?);", script, re.DOTALL)
    used = {
        variable["valueFrom"]["secretKeyRef"]["key"]
        for _, pod in all_pods()
        for container in containers(pod)
        for variable in container.get("env", [])
        if "valueFrom" in variable
    }
    assert used
    assert used <= set(names.replace("\\", " ").split())


def test_workers_differ_only_in_what_machines_they_need() -> None:
    (cluster,) = build("cluster")
    groups = {each["groupName"]: each for each in cluster["spec"]["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu", "spot"}
    for name, group in groups.items():
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (name != "cpu")
        assert group["template"]["spec"]["restartPolicy"] == "Never"  # as autoscaler v2 demands
    assert "nodeSelector" in groups["spot"]["template"]["spec"]

    def common(group: Manifest) -> Manifest:
        spec = {**group["template"]["spec"], "tolerations": [], "nodeSelector": {}}
        spec["containers"] = [{**each, "resources": {}} for each in spec["containers"]]
        return spec

    assert common(groups["cpu"]) == common(groups["gpu"]) == common(groups["spot"])


def test_shared_memory_and_scratch_fit_into_the_limits() -> None:
    units = {"Mi": 1 << 20, "Gi": 1 << 30}

    def size(text: str) -> int:
        return int(text[:-2]) * units[text[-2:]]

    (cluster,) = build("cluster")
    for where, pod in pods(cluster):
        limits = pod["containers"][0]["resources"]["limits"]
        volumes = [volume["emptyDir"] for volume in pod["volumes"]]
        memory = sum(size(each["sizeLimit"]) for each in volumes if "medium" in each)
        disk = sum(size(each["sizeLimit"]) for each in volumes if "medium" not in each)
        assert 0 < memory <= size(limits["memory"]) // 2, where
        assert 0 < disk <= size(limits["ephemeral-storage"]), where


@pytest.mark.parametrize("verb", ["train", "tune", "evaluate"])
def test_a_job_has_the_cluster_and_a_command_that_the_verb_accepts(verb: str) -> None:
    from jobs import submit

    (job,) = build(f"jobs/{verb}")
    (cluster,) = build("cluster")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    command, called, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (command, called) == ("tessera", verb)
    submit.parse(verb, tuple(arguments))
    assert job["spec"]["backoffLimit"] > 0
    if verb != "evaluate":
        assert "--run" in arguments, "a retry would begin another run"


def test_rays_version_is_the_locked_one() -> None:
    (cluster,) = build("cluster")
    (locked,) = re.findall(
        r"(?m)^ray(?:\[[\w,]+\])?==(\S+)", (ROOT / "requirements.lock").read_text()
    )
    assert cluster["spec"]["rayVersion"] == locked


def test_every_pod_is_under_a_network_policy_that_names_it() -> None:
    policies = [each for each in build("services") if each["kind"] == "NetworkPolicy"]
    everything = [p for p in policies if not p["spec"]["podSelector"]]
    assert {kind for p in everything for kind in p["spec"]["policyTypes"]} == {"Ingress", "Egress"}
    named: set[str] = set()
    for policy in policies:
        selector = policy["spec"]["podSelector"]
        named |= {value for key, value in selector.get("matchLabels", {}).items() if key == "app"}
        for expression in selector.get("matchExpressions", []):
            named |= set(expression["values"])
    assert named == {"tessera-ray", "tessera-submitter", "mlflow", "mlflow-user", "postgres"}
    for name in KUSTOMIZATIONS:
        for manifest in build(name):
            for label in re.findall(r"'app': '([\w-]+)'", str(manifest)):
                assert label in named


def test_nothing_is_published_outside_of_the_cluster() -> None:
    for name in KUSTOMIZATIONS:
        for manifest in build(name):
            assert manifest["kind"] != "Ingress"
            if manifest["kind"] == "Service":
                assert manifest["spec"].get("type", "ClusterIP") == "ClusterIP"

"""The Kubernetes pool's job template, rendered as Prefect's worker does, and the example of a Ray cluster.

Oracle: the published schemas of Kubernetes, in which unknown fields are errors.
"""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

INFRA = Path(__file__).resolve().parents[2] / "infra"
TEMPLATE = json.loads((INFRA / "prefect/kubernetes-pool.json").read_text())
_KUBERNETES = "1.33"
_CLUSTER_FIELDS = {
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
_GROUP_FIELDS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "labels",
    "rayStartParams",
    "template",
}


def rendered(**variables: Any) -> dict[str, Any]:
    """The job that a worker makes of the template for a run."""
    # Asked only for blocks and variables that a template names; without a client Prefect starts a server.
    client = PrefectClient("http://127.0.0.1:9/api")
    made = KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, variables, client=client)
    configuration = asyncio.run(made)
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="tiny to W4A16"))
    job = configuration.job_manifest
    # Prefect's worker insists on these two in the pod, where Kubernetes drops what it does not know.
    for name in ("completions", "parallelism"):
        assert job["spec"]["template"]["spec"].pop(name) == 1
    return job


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def test_job_of_a_plain_pool_is_valid():
    job = rendered(image="registry.example/quantmill:1")
    kubernetes_validate.validate(job, _KUBERNETES, strict=True)
    (container,) = pod_of(job)["containers"]
    assert container["image"] == "registry.example/quantmill:1"
    assert container["command"] == ["/opt/quantmill/infra/prefect/flow-pod"]
    assert container["args"][:1] == ["prefect"]
    assert not {entry["name"]: entry.get("value") for entry in container["env"]}["RAY_ADDRESS"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod_of(job)["volumes"]}


def test_variables_reach_their_places_and_the_job_is_valid():
    toleration = {"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}
    volume = {"name": "scratch", "persistentVolumeClaim": {"claimName": "scratch"}}
    mount = {"name": "scratch", "mountPath": "/scratch"}
    secret = {"secretRef": {"name": "quantmill-storage"}}
    job = rendered(
        image="registry.example/quantmill:1",
        ray_address="quantmill-head-svc:6379",
        env={"RAY_AUTH_MODE": "token"},
        env_from=[secret],
        cpu_request="2",
        cpu_limit="3",
        memory_request="5Gi",
        memory_limit="6Gi",
        node_selector={"pool": "flows"},
        tolerations=[toleration],
        volumes=[volume],
        volume_mounts=[mount],
        service_account_name="quantmill",
        termination_grace_seconds=90,
    )
    kubernetes_validate.validate(job, _KUBERNETES, strict=True)
    pod = pod_of(job)
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["RAY_ADDRESS"] == "quantmill-head-svc:6379"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert container["envFrom"] == [secret]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "5Gi"},
        "limits": {"cpu": "3", "memory": "6Gi"},
    }
    assert (pod["nodeSelector"], pod["tolerations"]) == ({"pool": "flows"}, [toleration])
    assert (pod["volumes"], container["volumeMounts"]) == ([volume], [mount])
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("quantmill", 90)


def test_validation_finds_a_misspelt_field():
    job = rendered(image="i", volumes=[{"name": "scratch", "emptyDirectory": {}}])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, _KUBERNETES, strict=True)


def test_every_variable_is_described_and_has_its_place():
    properties = TEMPLATE["variables"]["properties"]
    assert {found for found in properties if not properties[found].get("description")} == set()
    text = json.dumps(TEMPLATE["job_configuration"])
    assert {found for found in properties if f"{{{{ {found} }}}}" not in text} == set()
    assert TEMPLATE["variables"]["required"] == ["image"]


def test_pods_of_the_ray_cluster_are_valid():
    cluster = yaml.safe_load((INFRA / "kubernetes/raycluster.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    # Fields of the KubeRay API that the example uses; its schema is in no package.
    assert set(cluster["spec"]) == _CLUSTER_FIELDS
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        assert set(group) <= _GROUP_FIELDS
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, _KUBERNETES, strict=True)
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]

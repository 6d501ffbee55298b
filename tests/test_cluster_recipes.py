"""The recipes of examples/cluster: SLURM's script on dask-jobqueue's local stand-in, and the Kubernetes manifest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import child, write_file

from quantloom import Pipeline, __version__

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="jobs are shell scripts")
def test_the_script_of_slurm_converts(tmp_path: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    source = write_file(tmp_path / "in" / "s.safetensors")
    Pipeline().read(source).quantize("nvfp4").write(tmp_path / "expected.safetensors")
    words = (str(source), str(tmp_path / "o.safetensors"), "--local", "--jobs", "1", "--tasks", "1", "--memory", "2GB")
    ran = child(str(CLUSTER / "slurm.py"), *words, cwd=tmp_path)
    assert ran.status == 0, ran.err
    assert "layers quantized" in ran.out
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_job_of_slurm_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be handed to sbatch."""
    jobqueue = pytest.importorskip("dask_jobqueue")
    from test_docs import load

    script = load("slurm_example", CLUSTER / "slurm.py")
    given: dict[str, Any] = {}
    monkeypatch.setattr(jobqueue, "SLURMCluster", lambda **options: given.update(options))
    arguments = {"tasks": 6, "memory": "32GB", "local": False, "partition": "gpu", "walltime": "1:00", "device": "cuda"}
    script.make_cluster(argparse.Namespace(**arguments))
    job = jobqueue.slurm.SLURMJob(
        "tcp://127.0.0.1:8786", name="one", **{key: value for key, value in given.items() if key != "processes"},
        processes=given["processes"],
    )  # fmt: skip
    text = job.job_script()
    assert "#SBATCH --gres=gpu:1" in text
    assert "#SBATCH -p gpu" in text
    assert "--nthreads 6" in text


def test_the_manifest_of_kubernetes() -> None:
    made = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    assert (made["apiVersion"], made["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    [worker] = made["spec"]["worker"]["spec"]["containers"]
    [scheduler] = made["spec"]["scheduler"]["spec"]["containers"]
    assert worker["image"] == scheduler["image"]
    assert worker["image"].endswith(f":{__version__}")
    assert worker["args"][:2] == ["dask", "worker"]
    assert scheduler["args"][:2] == ["dask", "scheduler"]
    volumes = {volume["name"] for volume in made["spec"]["worker"]["spec"]["volumes"]}
    assert {mount["name"] for mount in worker["volumeMounts"]} <= volumes
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    [port] = made["spec"]["scheduler"]["service"]["ports"]
    assert port["targetPort"] in {each["name"] for each in scheduler["ports"]}

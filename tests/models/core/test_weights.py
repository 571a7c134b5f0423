"""Pretrained weights: every way to load them, every kind of damage, and nothing is executed."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.core.errors import TesseraError, UsageError
from models.core.weights import load_weights, read_weights

TENSORS = {"body.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.ones(2)}


def same(result: dict[str, torch.Tensor]) -> bool:
    return result.keys() == TENSORS.keys() and all(
        torch.equal(v, TENSORS[n]) for n, v in result.items()
    )


@pytest.fixture
def stored(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.fixture
def output_name(tmp_path):
    """The folder's files over HTTP; `/cut/NAME` promises more than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = tmp_path / self.path.partition("?")[0].rpartition("/")[2]
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            extra = 100 if self.path.startswith("/cut/") else 0
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + extra))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_reads_a_path_and_a_url(stored, output_name):
    assert same(read_weights(str(stored)))
    assert same(read_weights(stored.as_uri()))
    assert same(read_weights(f"{output_name}/w.safetensors?download=true"))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_reads_a_state_dict(tmp_path, wrap):
    torch.save(wrap({f"module.{n}": t for n, t in TENSORS.items()}), tmp_path / "w.pth")
    assert same(read_weights(str(tmp_path / "w.pth")))


def test_checks_the_digest(stored):
    digest = hashlib.sha256(stored.read_bytes()).hexdigest()
    assert same(read_weights(str(stored), digest.upper()))
    with pytest.raises(TesseraError, match=digest):
        read_weights(str(stored), "0" * 64)


class Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_is_not_executed(tmp_path, protocol):
    marker, path = tmp_path / "executed", tmp_path / "w.pth"
    torch.save({"weight": torch.ones(1), "x": Payload(str(marker))}, path, pickle_protocol=protocol)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(Payload(str(marker)), protocol=protocol))
    for file in (path, bare):
        with pytest.raises(TesseraError, match="contain more than weights"):
            read_weights(str(file))
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the control: the payload works
    assert marker.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_damaged_files_are_an_error(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[:40], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(TesseraError, match="damaged"):
            read_weights(str(path))


def test_missing_files_are_an_error(tmp_path, output_name):
    for source in (str(tmp_path / "no.pth"), f"{output_name}/no.pth", "http://127.0.0.1:1/no.pth"):
        with pytest.raises(TesseraError, match="can't be read"):
            read_weights(source)
    with pytest.raises(TesseraError, match="can't be read"):
        read_weights("http://127.0.0.1:1/no.pth")


def test_a_truncated_download_is_an_error(stored, output_name):
    with pytest.raises(TesseraError, match=r"received .* bytes|can't be read"):
        read_weights(f"{output_name}/cut/w.safetensors")


@pytest.mark.parametrize("source", ["w.pkl", "w", "ftp://host/w.pth", "s3://bucket/w.safetensors"])
def test_unknown_suffixes_and_schemes_are_refused(source):
    with pytest.raises(UsageError, match="is not supported"):
        read_weights(source)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "w.safetensors")
    with pytest.raises(TesseraError, match="not finite in a"):
        read_weights(str(tmp_path / "w.safetensors"))


def network(classes: int) -> nn.Module:
    return nn.ModuleDict(
        {"body": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3), "fc": nn.Linear(3, classes)}
    )


def test_only_the_head_can_differ():
    weights = network(5).state_dict()
    assert load_weights(network(5), weights, "fc", "w") == []
    assert load_weights(network(2), weights, "fc", "w") == ["fc.weight", "fc.bias"]
    headless = {n: t for n, t in weights.items() if not n.startswith("fc.")}
    assert load_weights(network(2), headless, "fc", "w") == ["fc.weight", "fc.bias"]
    old = {n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    assert load_weights(network(5), old, "fc", "w") == []
    missing = {n: t for n, t in weights.items() if n != "body.bias"}
    for wrong, message in (
        (missing, r"missing: body\.bias"),
        ({**weights, "tail.bias": torch.ones(1)}, r"not in the network: tail\.bias"),
        (
            {**weights, "body.bias": torch.ones(7)},
            r"of another shape: body\.bias \(7,\) for \(3,\)",
        ),
    ):
        net = network(2)
        before = net["body"].weight.clone()
        with pytest.raises(TesseraError, match=message):
            load_weights(net, wrong, "fc", "w")
        assert torch.equal(net["body"].weight, before)

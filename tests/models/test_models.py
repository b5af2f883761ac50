"""Opening bases by name, folder and single file; adding and downloading models, from a local stand-in hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minikin import Studio
from minikin.errors import BadModelFile, BadRecipe, NoNetwork, UnknownName
from minikin.models.base import Base
from minikin.models.loading import hub, registry, single_file
from minikin.models.loading.architectures import ARCHITECTURES, shrunk
from minikin.models.loading.registry import open_base
from minikin.perfusion.compatibility import compatibility
from tests.conftest import FAMILIES, build_pipeline
from tests.helpers import ldm
from tests.helpers.headers import KEY, header_only, shapes


def test_other_files_are_refused(tmp_path: Path) -> None:
    cases = [
        (
            header_only(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": [4, 4]}),
            "looks like a LoRA",
        ),
        (header_only(tmp_path / "odd.safetensors", shapes(4096)), "reads text 4096 numbers wide"),
        (
            header_only(tmp_path / "unet.safetensors", {k: v for k, v in shapes(768).items() if KEY in k}),
            "incomplete",
        ),
        (tmp_path / "none.safetensors", "There is no file"),
    ]
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04\x95" + bytes(200))
    cases.append((pickle, "is not a safetensors checkpoint"))
    for path, words in cases:
        with pytest.raises(BadModelFile, match=words):
            single_file.recognise(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_gives_the_images_of_its_folder(
    family: str, pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """A checkpoint in the original layout opens offline and gives the same images."""
    path = tmp_path / f"{family}.safetensors"
    save_file(ldm.checkpoint(pipelines[family], family), path)
    mini = single_file.Recognised(
        shrunk(ARCHITECTURES[family]), ARCHITECTURES[family].scheduler["prediction_type"], False
    )
    monkeypatch.setattr(single_file, "recognise", lambda *_: mini)
    ours = open_base(str(path), device="cpu", dtype="float32")
    folder = tmp_path / "folder"
    pipelines[family].save_pretrained(folder)
    reference = open_base(str(folder), device="cpu", dtype="float32")
    assert ours.text_hash == reference.text_hash and ours.fingerprint == reference.fingerprint
    sampler, preset = ("LCM", "lcm") if family.startswith("lcm") else ("DDIM", "quality")
    a, b = (  # the preset is named, for a file's name may choose one and a folder's not
        np.asarray(Studio(x).paint("a cat on the beach", steps=2, scheduler=sampler, preset=preset)[0], int)
        for x in (ours, reference)
    )
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize(("markers", "zero"), [(("v_pred", "ztsnr"), True), (("v_pred",), False)])
def test_zero_terminal_snr_is_followed(
    pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any, markers: tuple[str, ...], zero: bool
) -> None:
    """Tensors `v_pred` and `ztsnr` mark pure noise at the last timestep, where sampling then starts."""
    path = tmp_path / "noob.safetensors"
    save_file(ldm.checkpoint(pipelines["sdxl"], "sdxl") | {k: torch.ones(1) for k in markers}, path)
    monkeypatch.setattr(single_file, "_family", lambda *_: shrunk(ARCHITECTURES["sdxl"]))
    base = open_base(str(path), device="cpu", dtype="float32")
    assert base.prediction_type == "v_prediction"
    assert (float(base.pipe.scheduler.alphas_cumprod[-1]) < 1e-6) is zero
    assert (float(base.schedule.alphas_cumprod[-1]) < 1e-6) is zero  # for training
    base.pipe.scheduler.set_timesteps(4)
    assert (int(base.pipe.scheduler.timesteps[0]) == 999) is zero
    assert not single_file.recognise(path, "epsilon").zero_snr


def test_prediction_option_overrides_the_configuration(pipelines: dict[str, Any], tmp_path: Path) -> None:
    """For a folder that says epsilon and for tiny, which says v; also as it was added."""
    pipelines["sd15"].save_pretrained(tmp_path / "folder")
    for ref, stated, other in (
        (tmp_path / "folder", "epsilon", "v_prediction"),
        ("tiny", "v_prediction", "epsilon"),
    ):
        assert open_base(str(ref), device="cpu").prediction_type == stated
        assert open_base(str(ref), device="cpu", prediction=other).prediction_type == other
    registry.add(tmp_path / "folder", "mine", prediction="v_prediction")
    base = open_base("mine", device="cpu")
    assert base.prediction_type == base.pipe.scheduler.config.prediction_type == "v_prediction"
    assert open_base("mine", device="cpu", prediction="epsilon").prediction_type == "epsilon"
    with pytest.raises(BadRecipe, match="Known: epsilon, v_prediction"):
        open_base("tiny", prediction="v")
    with pytest.raises(BadRecipe, match="Known: epsilon, v_prediction"):
        registry.add(tmp_path / "folder", "x", prediction="v")


def test_inpainting_checkpoint_is_recognised(
    pipelines: dict[str, Any], photos: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nine input channels are recognised from the file; painting from a prompt alone is refused."""
    state = ldm.checkpoint(pipelines["sd15"], "sd15")
    first = KEY + "input_blocks.0.0.weight"
    w = state[first]
    state[first] = torch.cat([w, torch.zeros(w.shape[0], 5, *w.shape[2:])], 1).contiguous()
    path = tmp_path / "sd15-inpainting.safetensors"
    save_file(state, path)
    small = shrunk(ARCHITECTURES["sd15"])
    monkeypatch.setattr(single_file, "_family", lambda *_: small)
    base = open_base(str(path), device="cpu", dtype="float32")
    assert base.is_inpainting and base.denoiser.conv_in.weight.shape[1] == 9
    assert torch.equal(base.denoiser.conv_in.weight[:, :4], w)
    with pytest.raises(BadRecipe, match="is an inpainting model"):
        Studio(base).paint("a cat", steps=1)
    with pytest.raises(BadRecipe, match="Teach on the ordinary model"):
        Studio(base).teach(photos, name="tom", category="cat", mode="value", steps=1, batch=1)


def test_hub_id_opens_from_the_local_cache(pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """A repository in the hub's cache opens by its id without network access and without its safety checker."""
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import constants

    repo, commit = tmp_path / "models--someone--cats", "a" * 40
    parts = {**pipelines["sd15"].components, **safety_checker()}
    StableDiffusionPipeline(**parts).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("diffusers.utils.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    base = open_base("someone/cats", device="cpu", dtype="float32")
    assert base.architecture == Base(pipelines["sd15"]).architecture
    assert base.fingerprint == Base(pipelines["sd15"]).fingerprint
    assert base.pipe.safety_checker is None
    assert open_base(str(repo / "snapshots" / commit), device="cpu").pipe.safety_checker is None


def safety_checker() -> dict[str, Any]:
    """A miniature of the safety checker of Stable Diffusion 1."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(projection_dim=8, vision_config=small | {"image_size": 32, "patch_size": 32})
    return {"safety_checker": StableDiffusionSafetyChecker(config), "feature_extractor": CLIPImageProcessor()}


def test_open_by_folder_and_added_name(pipelines: dict[str, Any], tmp_path: Path) -> None:
    pipelines["sd15"].save_pretrained(tmp_path / "My Model")
    entry = registry.add(tmp_path / "My Model")
    assert entry.name == "my-model" and "my-model" in registry.entries()
    assert open_base("my-model", device="cpu").name == "my-model"


def test_tiny_is_an_ordinary_folder() -> None:
    """Stock diffusers opens the embedded base and paints what Minikin paints."""
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(registry.tiny_folder(), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    g = [torch.Generator().manual_seed(3)]
    reference = stock("a cat on the beach", num_inference_steps=4, guidance_scale=3.0, generator=g).images[0]
    (ours,) = Studio.open("tiny").paint("a cat on the beach", steps=4, seed=3)
    assert np.array_equal(np.asarray(ours), np.asarray(reference))


@pytest.mark.parametrize(
    ("ref", "error", "words"),
    [("sd-15", UnknownName, "Did you mean 'sd15'"), ("sdxl", NoNetwork, "minikin models pull sdxl"),
     ("someone/something", NoNetwork, "is not on this machine")],
)  # fmt: skip
def test_missing_bases_are_refused(ref: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_base(ref)


def test_invalid_folders_devices_and_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="is not a folder of diffusers with a model of the families"):
        open_base(str(tmp_path))
    with pytest.raises(BadRecipe, match="There is no device 'tpu'"):
        open_base("tiny", device="tpu")
    with pytest.raises(BadRecipe, match="Unknown dtype 'float8'"):
        open_base("tiny", dtype="float8")
    with pytest.raises(BadRecipe, match="is the name of a known model"):
        registry.add(header_only(tmp_path / "sdxl.safetensors", shapes(2048)))


def test_a_damaged_entry_does_not_hide_the_others(pipelines: dict[str, Any], tmp_path: Path) -> None:
    pipelines["sd15"].save_pretrained(tmp_path / "good")
    registry.add(tmp_path / "good")
    (registry.models_folder() / "bad.json").write_text("{")
    assert set(registry.entries()) == {"good"}


def test_a_concept_of_another_base_is_refused(bases: dict[str, Any], photos: Any) -> None:
    """A concept of SD 1.5 on SDXL: what, why and what to do."""
    from minikin.errors import BaseMismatch

    tom = Studio(bases["sd15"]).teach(photos, name="tom", category="cat", mode="value", steps=1, batch=1)
    with pytest.raises(BaseMismatch, match="the open base is sdxl"):
        Studio(bases["sdxl"]).add(tom)


def test_a_concept_of_a_sibling_base_is_accepted(bases: dict[str, Any], photos: Any, tmp_path: Path) -> None:
    """Same text encoder, other U-Net weights."""
    from minikin.models.base import Base

    pipe = build_pipeline("sd15", tmp_path)
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.mul_(1.01)
    tom = Studio(bases["sd15"]).teach(photos, name="tom", category="cat", mode="value", steps=1, batch=1)
    sibling = Base(pipe)
    assert compatibility(sibling, tom) == "sibling" and compatibility(bases["sd15"], tom) == "same"
    Studio(sibling).add(tom)


# ---- downloads ------------------------------------------------------------------------------------


class StandInHub(http.server.BaseHTTPRequestHandler):
    """A model hub on this machine: file list, ranges, and faults on request."""

    files: dict[str, bytes] = {}
    cut_at: int | None = None
    damage = False
    ranges: list[str] = []

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            siblings = [
                {"rfilename": k, "size": len(v), "lfs": {"sha256": hashlib.sha256(v).hexdigest()}}
                for k, v in self.files.items()
            ]
            facts = {"sha": "abc123", "siblings": siblings, "cardData": {"license": "mit"}}
            return self.answer(200, json.dumps(facts).encode())
        name = self.path.split("/resolve/abc123/", 1)[-1]
        if name not in self.files:
            return self.answer(404, b"")
        data, start = self.files[name], 0
        if requested := self.headers.get("Range"):
            self.ranges.append(requested)
            start = int(requested.removeprefix("bytes=").rstrip("-"))
        body = data[start:]
        if self.damage and name.endswith(".safetensors"):
            body = body[:-1] + b"?"
        return self.answer(206 if start else 200, body)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = StandInHub.cut_at
        StandInHub.cut_at = None if cut is not None and len(body) > cut else cut
        self.wfile.write(body[:cut] if cut is not None and len(body) > cut else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub_server(pipelines: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> Any:
    folder = tmp_path / "repo"
    pipelines["sd15"].save_pretrained(folder)
    (folder / "unet" / "evil.bin").write_bytes(b"\x80\x04pickle")
    StandInHub.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    StandInHub.cut_at, StandInHub.damage, StandInHub.ranges = None, False, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield StandInHub
    server.shutdown()


def test_pull_downloads_safetensors_only(hub_server: Any) -> None:
    """The plan has size and licence; pickles are not downloaded; the model then opens by name."""
    p = hub.plan("owner/name")
    assert p.licence == "mit" and p.size > 1_000_000
    assert not any(f.name.endswith(".bin") for f in p.files)
    done = list(hub.pull(p))[-1]
    assert open_base(done.result.name, device="cpu").architecture == "tiny"  # a miniature's width


def test_pull_resumes_where_the_connection_ended(hub_server: Any) -> None:
    hub_server.cut_at = 400_000
    with pytest.raises(NoNetwork, match="run the same command to go on"):
        list(hub.pull(hub.plan("owner/name")))
    list(hub.pull(hub.plan("owner/name")))
    assert hub_server.ranges and hub_server.ranges[0] == "bytes=400000-"


def test_the_token_is_not_sent_to_hosts_of_redirects(hub_server: Any, monkeypatch: Any) -> None:
    """Other hosts receive the range request, but not the user's token."""
    requests: list[tuple[str, str | None, str | None]] = []

    class FileHost(StandInHub):
        def do_GET(self) -> None:
            requests.append(("file host", self.headers.get("Authorization"), self.headers.get("Range")))
            super().do_GET()

    class Hub(StandInHub):
        def do_GET(self) -> None:
            requests.append(("hub", self.headers.get("Authorization"), self.headers.get("Range")))
            if self.path.startswith("/api/models/"):
                return super().do_GET()
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{servers[1].server_port}{self.path}")
            self.send_header("Content-Length", "0")
            return self.end_headers()

    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Hub, FileHost)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{servers[0].server_port}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub_server.files = {"model.safetensors": b"x" * 100, "config.json": b"{}"}
    part = registry.models_folder() / "clipseg" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 40)
    list(hub.pull(hub.plan("clipseg")))
    for server in servers:
        server.shutdown()
    assert {token for host, token, _ in requests if host == "hub"} == {"Bearer secret"}
    assert [(t, r) for host, t, r in requests if host == "file host"] == [(None, "bytes=40-"), (None, None)]


def test_pull_refuses_damaged_files(hub_server: Any) -> None:
    hub_server.damage = True
    with pytest.raises(BadModelFile, match="arrived damaged"):
        list(hub.pull(hub.plan("owner/name")))


def test_pull_without_a_network(monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NoNetwork, match="Without a network, add a file you have"):
        hub.plan("sd15")
    with pytest.raises(UnknownName, match="Unknown model 'sd99'"):
        hub.plan("sd99")


def test_pull_of_a_model_that_is_no_base(hub_server: Any) -> None:
    """CLIPSeg is one model at the top of its repository, not a pipeline."""
    hub_server.files = {"config.json": b"{}", "model.safetensors": b"x" * 100, "pytorch_model.bin": b"y"}
    p = hub.plan("clipseg")
    assert [f.name for f in p.files] == ["config.json", "model.safetensors"]
    assert p.licence == "Apache-2.0"
    done = list(hub.pull(p))[-1]
    assert (Path(done.facts["folder"]) / "model.safetensors").read_bytes() == b"x" * 100

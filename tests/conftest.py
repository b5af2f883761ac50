"""Fixtures: miniatures of every architecture, the embedded base, private folders."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ["MINIKIN_RESIDENT"] = "0"  # no test leaves a process behind
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # every server here is this machine's

import numpy as np
import pytest
import torch
from PIL import Image

from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.loading.architectures import ARCHITECTURES, shrunk, write_configs
from tests.helpers import pixart, sana
from tests.helpers.flat import two_levels

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or min(2, len(os.sched_getaffinity(0))))
torch.set_num_threads(1 if WORKER else THREADS)
if WORKER:  # what children inherit: two workers with two threads each would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
FAMILIES = tuple(ARCHITECTURES)
TRANSFORMERS = ("pixart-alpha", "pixart-sigma", "sana", "sana-sprint")
ALL_FAMILIES = (*FAMILIES, *TRANSFORMERS)
LONGEST = (  # groups that are started first, so that no worker ends long after the other
    "ray", "test_distilling.py", "test_page_work.py", "test_cli.py", "test_kills.py", "test_architectures.py",
    "test_img2img.py", "test_backends.py", "test_compare.py", "test_page.py", "test_schema.py",
    "test_teaching.py", "test_demo.py", "test_load.py", "test_build.py", "test_sweep.py", "test_resident.py",
    "test_server_load.py",
)  # fmt: skip
HOMES = itertools.count()
SHARED = pytest.StashKey[dict[str, tuple[list[torch.nn.Module], list[float]]]]()  # by fixture: modules, sums


NUMERIC = {  # files whose tests claim equality to the bit
    "test_architectures.py", "test_adapters.py", "test_batching.py", "test_condition.py", "test_decode.py",
    "test_distilling_data.py", "test_distilling_networks.py", "test_generate.py", "test_sampler.py",
    "test_trainer.py", "test_sana.py", "test_transformers.py", "test_nodes.py",
}  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Workers are given groups in LONGEST's order: pytest-xdist's own begins with those of most tests, so that
    a group of one long test came last, with the other worker idle."""
    config.option.loadscopereorder = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell: children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before the whole suite: what it takes and what this machine lacks. (A header is not shown with -q.)"""
    config = session.config
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if not reporter or config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.markexpr:
        return
    missing = {
        "the page in a browser (Chromium)": not any(map(shutil.which, ("chromium", "chromium-browser"))),
        "clusters (ray)": not find_spec("ray"),
        "the OpenVINO backend (openvino)": not find_spec("openvino"),
        "Content Credentials (c2pa)": not find_spec("c2pa"),
    }
    skipped = ", ".join(name for name, gone in missing.items() if gone) or "nothing"
    reporter.write_line(
        "The whole suite takes about 14 minutes on two cores with -n 2, as `make test` runs it."
    )
    reporter.write_line(
        f"Skipped here: {skipped}. Soak, controls and numeric have `make` targets of their own."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out marks that must be asked for by name; give each worker whole files, the longest first.

    Module fixtures (servers, taught concepts) are then made once. All tests on Ray are one group, so that there
    is one cluster at a time.
    """
    for item in items:
        if item.path.name in NUMERIC:
            item.add_marker(pytest.mark.numeric)
    for mark in ("soak", "controls"):
        if mark not in (config.option.markexpr or ""):
            items[:] = [item for item in items if not item.get_closest_marker(mark)]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    rank = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(group_of(item), len(rank)))


def group_of(item: pytest.Item) -> str:
    """What one worker runs alone: the file, or everything on Ray."""
    return "ray" if item.get_closest_marker("ray") else item.path.name


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that walks it would stop a test, or count as its work."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which tests failed, once more and last: what they said can be longer than what a log keeps."""
    for kind in ("failed", "error"):
        for report in terminalreporter.getreports(kind):
            terminalreporter.write_line(f"{kind}: {report.nodeid}")


def shared_cache(tmp_path_factory: Any) -> Path:
    """The cache folder of the whole run, for all its workers: tiny's covariance is computed once."""
    base: Path = tmp_path_factory.getbasetemp()
    return (base.parent if WORKER else base) / "cache"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: Any, monkeypatch: Any) -> None:
    """Every test has its own data folder; the cache is shared within a run (C of tiny is in it)."""
    home = tmp_path_factory.getbasetemp() / f"home{next(HOMES)}"  # mktemp would look at all that are there
    home.mkdir()
    monkeypatch.setenv("MINIKIN_HOME", str(home))
    monkeypatch.setenv("MINIKIN_CACHE", str(shared_cache(tmp_path_factory)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For what must be repeated bit for bit: with more, PyTorch's gradient of a convolution over a 1x1 map,
    the lowest level of the miniatures, was another one in 173 of 200 repetitions; larger maps' never was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick_disk() -> Iterator[None]:
    """For what does not ask whether data survives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Drawing the learning curve takes a sixth of these short runs; training/test_trainer.py looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minikin.training.logger.curve", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def short_teaching() -> Iterator[None]:
    """An evaluation of 2 examples, not 16, and samples of 2 steps, not 15: of teaching for two steps they take
    nine tenths. Both are whole in perfusion/test_teaching.py and in what the demo teaches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minikin.perfusion.train.EVALUATION", 2)
        patch.setattr("minikin.studio.studio.SAMPLE_STEPS", 2)
        yield


def filling(writes: int) -> Callable[[int], None]:
    """An os.fsync of a disk that is full after so many writes."""
    real, left = os.fsync, iter(range(writes))

    def fsync(handle: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    return fsync


def equal(a: Image.Image, b: Image.Image) -> bool:
    """To the bit, without pages of bytes where they are not."""
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def command(monkeypatch: Any, capsys: Any, *args: object) -> tuple[int, str, str]:
    """Run `minikin args`; exit code, standard output, standard error."""
    from minikin.cli.app import main

    monkeypatch.setattr("sys.argv", ["minikin", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as e:
        code = int(e.code or 0)
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture
def cli(monkeypatch: Any, capsys: Any, tmp_path: Path) -> Any:
    """`cli("paint", ...)` as typed in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: command(monkeypatch, capsys, *args)


def build_pipeline(name: str, folder: Path, seed: int = 0, *, flat: bool = False) -> Any:
    """A miniature pipeline with random weights; of U-Nets, the folder has the configurations.

    flat  with two levels only
    """
    if name in TRANSFORMERS:
        return (sana if name in sana.PUBLISHED else pixart).miniature(name, seed)
    import diffusers
    import transformers

    architecture = shrunk(ARCHITECTURES[name])
    configs = write_configs(two_levels(architecture) if flat else architecture, folder)
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel.from_config(
        diffusers.UNet2DConditionModel.load_config(configs / "unet")
    )
    for p in unet.parameters():  # away from symmetric starts, so that every path matters
        if p.ndim == 1:
            p.data.add_(0.1 * torch.randn_like(p))
    parts: dict[str, Any] = {"unet": unet}
    parts["vae"] = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(configs / "vae"))
    config = diffusers.DDIMScheduler.load_config(configs / "scheduler")
    parts["scheduler"] = getattr(diffusers, config["_class_name"]).from_config(config)
    for k, tail in enumerate(["", "_2"][: len(ARCHITECTURES[name].texts)]):
        config = transformers.CLIPTextConfig.from_pretrained(configs / f"text_encoder{tail}")
        cls = transformers.CLIPTextModelWithProjection if k else transformers.CLIPTextModel
        parts[f"text_encoder{tail}"] = cls(config)
        parts[f"tokenizer{tail}"] = transformers.CLIPTokenizer.from_pretrained(configs / f"tokenizer{tail}")
    cls = getattr(diffusers, ARCHITECTURES[name].pipeline)
    if name != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from_pretrained leaves it
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipelines(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, Any]:
    """One miniature pipeline of every architecture, without Minikin on it."""
    created = {n: build_pipeline(n, tmp_path_factory.mktemp(f"mini-{n}")) for n in ALL_FAMILIES}
    parts = [part for pipe in created.values() for part in pipe.components.values()]
    share(request, [part for part in parts if isinstance(part, torch.nn.Module)])
    return created


@pytest.fixture(scope="session")
def bases(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, Base]:
    """The same miniatures as bases (same weights: same seeds)."""
    created = {n: Base(build_pipeline(n, tmp_path_factory.mktemp(f"base-{n}")), n) for n in ALL_FAMILIES}
    share(request, [part for base in created.values() for part in base.modules])
    return created


class Flat(dict[str, Any]):
    """Miniatures with two levels, by name; each is built when it is needed first."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path, as_base: bool) -> None:
        self.request, self.folder, self.as_base = request, folder, as_base

    def __missing__(self, name: str) -> Any:
        with torch.random.fork_rng(devices=[]):  # the test that comes first has the numbers that others have
            pipe = build_pipeline(name, self.folder / name, flat=True)
        self[name] = Base(pipe, name) if self.as_base else pipe
        share(self.request, [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)])
        return self[name]


@pytest.fixture(scope="session")
def flat_pipelines(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, Any]:
    """`pipelines` with two levels, for what does not depend on how many there are."""
    return Flat(request, tmp_path_factory.mktemp("flat-mini"), False)


@pytest.fixture(scope="session")
def flat_bases(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, Base]:
    """`bases` with two levels, and the weights of `flat_pipelines`."""
    return Flat(request, tmp_path_factory.mktemp("flat-base"), True)


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> Base:
    """The embedded base, one for all tests."""
    from minikin.models.loading.registry import open_base

    base = open_base("tiny", device="cpu")
    share(request, base.modules)
    return base


def share(request: pytest.FixtureRequest, modules: Sequence[torch.nn.Module]) -> None:
    """Note what the weights of a fixture of all tests are, or what was added to it."""
    assert request.fixturename
    noted = request.config.stash.setdefault(SHARED, {}).setdefault(request.fixturename, ([], []))
    noted[0].extend(modules)
    noted[1].extend(sums(modules))


def sums(modules: Sequence[torch.nn.Module]) -> list[float]:
    """Of every weight: anything that was rounded or left changed shows. By NumPy: PyTorch's sums depend on how
    many threads there are, and `one_thread` may come before what is shared is created."""
    return [float(p.detach().double().numpy().sum()) for part in modules for p in part.parameters()]


def changed(config: pytest.Config, fixtures: Collection[str]) -> list[str]:
    """Which of these fixtures have other weights than they began with."""
    shared = config.stash.get(SHARED, {})
    return [name for name, (modules, before) in shared.items() if name in fixtures and sums(modules) != before]


def frozen(config: pytest.Config) -> list[str]:
    """Which shared fixtures have weights that need no gradient: PyTorch uses other kernels for them."""
    shared = config.stash.get(SHARED, {})
    return [
        name
        for name, (modules, _) in shared.items()
        if not all(p.requires_grad for part in modules for p in part.parameters())
    ]


@pytest.fixture(scope="module", autouse=True)
def _shared_weights_are_left_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    """To bfloat16 and back is not the same weights: a later file would fail for it, and not when run alone."""
    yield
    here = [item for item in request.session.items if item.path == request.path]
    used = {name for item in here if isinstance(item, pytest.Function) for name in item.fixturenames}
    wrong = changed(request.config, used)
    assert not wrong, f"{request.node.name} changed what all tests share: {', '.join(wrong)}."
    for name in frozen(request.config):  # PEFT freezes a pipeline's weights for good when it loads a LoRA
        for part in request.config.stash[SHARED][name][0]:
            part.requires_grad_(True)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: Any) -> Iterator[Any]:
    """One cluster of this machine's own for the whole file."""
    from minikin.cluster.pool import Cluster

    if not find_spec("ray"):  # not imported before its environment is set
        pytest.skip("Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIKIN_CACHE", str(shared_cache(tmp_path_factory)))
        patch.setenv("MINIKIN_HOME", str(tmp_path_factory.mktemp("fleet-home")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # by its default, 15, a busy machine lets workers starve
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # which ends workers for what others use
        here = str(Path(__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
            patch.setenv(name, "")  # noted, so that what Ray is given is gone afterwards
            patch.delenv(name)
        with Cluster(4, cpus=1, gpus=0).joined() as module:  # room for replicas beside workers
            yield module


@pytest.fixture
def photos() -> list[Photo]:
    return square_photos()


def square_photos() -> list[Photo]:
    """Three small images with a coloured square as the subject, and its mask."""
    rng = np.random.default_rng(0)
    created = []
    for k in range(3):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.float32)
        mask[16:48, 16:48] = 1
        pixels[16:48, 16:48] = (220, 60, 90)
        created.append(Photo(f"{k}.png", pixels, mask))
    return created


@pytest.fixture
def photo_folder(tmp_path: Path, photos: list[Photo]) -> Path:
    """The photos as files with masks beside them."""
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    for p in photos:
        Image.fromarray(p.pixels).save(folder / p.name)
        assert p.mask is not None
        Image.fromarray((p.mask * 255).astype(np.uint8)).save(folder / "masks" / p.name)
    return folder

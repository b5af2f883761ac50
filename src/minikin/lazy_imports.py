"""Imports that diffusers and transformers make when they start and that no image needs, put off until used.

The commands but `serve` and `studio` install this: `import minikin` and servers with many threads import as
always. An image from the shell then takes three quarters of the processor time (docs/measurements.md):

* `PACKAGES` run their own code when something asks for a name that they do not have yet. Their modules can
  be imported meanwhile: the U-Net needs two of diffusers' forty transformers.
* `NAMES` are imported when they are called or when something asks whether an object is their instance.
* What diffusers tells `torch.compile` about its classes and methods is told when `torch._dynamo` is imported.

Everything works as before, later: a stock pipeline with a LoRA, layerwise casting, offloading, beta sigmas,
`torch.compile`. Where a version of the libraries imports other names, or has imported them before Minikin
was, they are imported at once, as usual.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"
PACKAGES = (
    "diffusers.hooks", "diffusers.models.autoencoders", "diffusers.models.transformers", "scipy.integrate",
    "scipy.stats",
)  # fmt: skip
Names = Mapping[str, Sequence[str]]  # by module
_COMPILER: Names = {
    DYNAMO: ("allow_in_graph", "assume_constant_result", "disable"),
    f"{DYNAMO}._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
}
_TUNER: Names = {"peft.tuners.tuners_utils": ("BaseTunerLayer",)}
NAMES: dict[str, Names] = {  # by the module that imports them, itself or through others
    "diffusers.utils.torch_utils": _COMPILER,
    "diffusers.guiders": _COMPILER,
    "diffusers.hooks.group_offloading": _COMPILER,
    "diffusers.hooks.layerwise_casting": {"peft.helpers": ("disable_input_dtype_casting",), **_TUNER},
    "diffusers.loaders.lora_base": _TUNER,
    "diffusers.pipelines.pipeline_utils": _COMPILER,
    "transformers.loss.loss_utils": {"scipy.optimize": ("linear_sum_assignment",)},
    "transformers.masking_utils": _COMPILER,
    "transformers.modeling_utils": _COMPILER,
}
# functions that import a package to find that nothing of it is there: they give False while it is not loaded
UNLESS_LOADED = {
    "diffusers.pipelines.pipeline_loading_utils": {"is_peft_available": "peft"},  # asks for wrapped models
    "diffusers.utils.peft_utils": {"scale_lora_layers": "peft", "unscale_lora_layers": "peft"},
    "diffusers.utils.torch_utils": {"is_compiled_module": DYNAMO},
}  # fmt: skip
INSTALLED = "diffusers.utils.import_utils"  # makes a table of what is installed
_LISTED = {
    *PACKAGES, *NAMES, *UNLESS_LOADED, INSTALLED, DYNAMO,
    # large ones, only to run without garbage collection
    "torch", "diffusers.utils", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
}  # fmt: skip


def install() -> None:
    """Put off these imports in this process; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules listed here as the other finders do, and gives them a `_Loader`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name not in _LISTED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Runs a module's code later (`PACKAGES`), or with stand-ins for what it imports (`NAMES`)."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        if name in PACKAGES:
            module.__class__ = _Package
            return
        with _uncollected():
            self._run(module)
        _ask_if_loaded(module)
        if name == DYNAMO:
            _with_compiler(module)

    def _run(self, module: ModuleType) -> None:
        name = module.__name__
        try:
            with _distributions_later() if name == INSTALLED else _stand_ins(NAMES.get(name, {})):
                self.loader.exec_module(module)
        except Exception:  # of a version that does more with the names than was foreseen
            if name not in NAMES:
                raise
            self.loader.exec_module(module)


class _Distributions(Mapping[str, list[str]]):
    """`importlib.metadata.packages_distributions()` when asked: it reads files of every installed package."""

    def __init__(self, read: Callable[[], Mapping[str, list[str]]]) -> None:
        self._all = cache(read)

    def __getitem__(self, package: str) -> list[str]:
        return self._all()[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


@contextmanager
def _distributions_later() -> Iterator[None]:
    """Context in which diffusers' table of installed packages is made without reading them."""
    import importlib.metadata

    read = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _Distributions(read)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = read


@contextmanager
def _uncollected() -> Iterator[None]:
    """Context without garbage collection: imports make a million objects and no garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_lock = threading.RLock()
_running: set[str] = set()


class _Package(ModuleType):
    """A package whose own code has not run yet."""

    def __getattr__(self, name: str) -> Any:
        with _lock:
            if type(self) is _Package and self.__name__ not in _running:
                _running.add(self.__name__)
                try:
                    self.__loader__.exec_module(self)  # type: ignore[union-attr]
                    self.__class__ = ModuleType  # type: ignore[assignment]
                finally:
                    _running.remove(self.__name__)
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Name:
    """A function or class that is imported when it is used."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _value(self) -> Any:
        if isinstance(sys.modules.get(self._module), _StandIn):
            del sys.modules[self._module]
        return getattr(import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._value()(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and isinstance(instance, self._value())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)


class _StandIn(ModuleType):
    """Stands for a module while another module's code imports names from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for a package's names
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


@contextmanager
def _stand_ins(names: Names) -> Iterator[None]:
    """Context in which modules that are not loaded are replaced by ones that have these names."""
    modules = [_StandIn(module) for module in names if module not in sys.modules]
    for module in modules:
        where = module.__name__
        for name in names[where]:
            setattr(module, name, _stand_in(where, name))
        sys.modules[where] = module
    try:
        yield
    finally:
        for module in modules:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]


_marked: list[tuple[str, Any]] = []
_dynamo: list[ModuleType] = []


def _marker(mark: str) -> Callable[[Any], Any]:
    """A decorator of `torch._dynamo` that marks what it gets, as soon as `torch._dynamo` is imported."""

    def decorate(function: Any) -> Any:
        _marked.append((mark, function))
        for dynamo in _dynamo:
            _mark(dynamo)
        return function

    return decorate


def _mark(dynamo: ModuleType) -> None:
    while _marked:
        mark, function = _marked.pop()
        getattr(dynamo, mark)(function)


def _disable(function: Any = None, recursive: bool = True, **_: Any) -> Any:
    """`torch._dynamo.disable` at the function's first call: what torch does with its own functions."""
    from torch._compile import _disable_dynamo

    return _disable_dynamo(function, recursive)


def _stand_in(module: str, name: str) -> Any:
    if module != DYNAMO:
        return _Name(module, name)
    return _disable if name == "disable" else _marker(name)


def _with_compiler(dynamo: ModuleType) -> None:
    """Mark what was marked before, and undo what models meet: the compiler traces the libraries' own code."""
    _dynamo[:] = [dynamo]
    _mark(dynamo)
    for importer in NAMES.keys() & sys.modules.keys():
        for name, value in list(vars(sys.modules[importer]).items()):
            if isinstance(value, _Name) and value._module.startswith(DYNAMO):
                setattr(sys.modules[importer], name, value._value())
    for module, functions in UNLESS_LOADED.items():
        for name in functions if module in sys.modules else ():
            function = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, getattr(function, "__wrapped__", function))


def _ask_if_loaded(module: ModuleType) -> None:
    """Replace the functions of `UNLESS_LOADED` in this module."""
    for name, package in UNLESS_LOADED.get(module.__name__, {}).items():
        if hasattr(module, name):
            setattr(module, name, _asking(getattr(module, name), package))


def _asking(function: Callable[..., Any], package: str) -> Callable[..., Any]:
    @wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        return package in sys.modules and function(*args, **kwargs)

    return ask

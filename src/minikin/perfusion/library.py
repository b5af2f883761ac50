"""Where concepts are found: the current folder first, then the user's own library."""

from __future__ import annotations

from pathlib import Path

from minikin.errors import BadConceptFile, BadRecipe, UnknownName
from minikin.files import atomic_write, data_folder, sweep_orphans
from minikin.perfusion.concept import NAME, Concept, check_name
from minikin.perfusion.index import Index, Listed

MANY = 200  # files in a folder: from there on an index knows their names


def library_folder() -> Path:
    return data_folder() / "concepts"


def folders() -> list[Path]:
    return [Path.cwd(), library_folder()]


def names() -> dict[str, Path]:
    """File of every concept by file name; the current folder wins. Contents are not checked."""
    return {name: path for folder in reversed(folders()) for name, path in _names(folder).items()}


def _names(folder: Path) -> dict[str, Path]:
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(paths) > MANY:
        return {one.name: one.path for one in Index().search(folder)}
    return {path.stem: path for path in paths if _looks_like_concept(path)}


def search(
    text: str = "", *, category: str = "", limit: int | None = None, hashed: bool = False
) -> list[Listed]:  # fmt: skip
    """Concepts whose names hold `text`, of this category, by name; the current folder wins.

    hashed  with the SHA-256 of their files
    """
    index, found = Index(), dict[str, Listed]()
    for folder in reversed(folders()):
        found |= {
            one.name: one for one in index.search(folder, text, category=category, limit=limit, hashed=hashed)
        }
    return [found[name] for name in sorted(found)][:limit]


def count(text: str = "", *, category: str = "") -> int:
    """How many files `search` looks at without a limit; one in both folders counts twice."""
    index = Index()
    return sum(index.count(folder, text, category=category) for folder in folders())


def locate(name: str) -> Path | None:
    """The concept file of this name, without looking at any other."""
    paths = (folder / f"{name}.safetensors" for folder in folders())
    return next((p for p in paths if p.is_file() and _looks_like_concept(p)), None)


def near(name: str) -> list[str]:
    """Names to compare a misspelt one with: all, or of very many those that begin alike."""
    known = [one.name for one in search(name[:1])] if count() > MANY else list(names())
    alike = [n for n in known if n[:2] == name[:2]] if len(known) > MANY else known
    return alike[:MANY]


def _unknown(name: str) -> UnknownName:
    return UnknownName(
        "concept", name, near(name),
        f"Concepts are NAME.safetensors files in this folder or in {library_folder()}.",
    )  # fmt: skip


def find(name: str) -> Concept:
    """The concept `name`; raises UnknownName with the nearest names, or BadConceptFile."""
    check_name(name)
    path = locate(name)
    if path is None:
        raise _unknown(name)
    from minikin.perfusion.concept_file import load

    concept = load(path)
    return concept if concept.name == name else concept.renamed(name)


def resolve(ref: str) -> Path:
    """A concept's file from its name or path; raises UnknownName or BadConceptFile."""
    path = Path(ref)
    if path.suffix == ".safetensors" or path.exists():
        if not path.is_file():
            raise BadConceptFile(f"There is no concept file {path}.")
        return path
    found = locate(ref) if NAME.fullmatch(ref) else None
    if found is None:
        raise _unknown(ref)
    return found


def keep(path: Path) -> Path:
    """Copy a concept file into the user's library under its own name; raises BadConceptFile."""
    from minikin.perfusion.concept_file import load  # needs PyTorch, which names and searches do not

    concept = load(path)
    target = library_folder() / f"{concept.name}.safetensors"
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise BadRecipe(
            f"Your library has another concept '{concept.name}' ({target}). Remove it first: "
            f"minikin concepts remove {concept.name}."
        )
    sweep_orphans(target.parent)
    return atomic_write(target, path.read_bytes())


def kept(name: str) -> Path | None:
    """The file of this name in the user's library."""
    path = library_folder() / f"{name}.safetensors"
    return path if path.is_file() else None


def remove(name: str) -> Path:
    """Take a concept out of the user's library; raises UnknownName."""
    check_name(name)
    target = library_folder() / f"{name}.safetensors"
    if not target.is_file():
        mine = [p.stem for p in library_folder().glob("*.safetensors")]
        raise UnknownName("concept of your library", name, mine, "Files in this folder are yours to delete.")
    target.unlink()
    return target


def _looks_like_concept(path: Path) -> bool:
    try:
        with open(path, "rb") as f:
            return b"minikin.format" in f.read(65536)
    except OSError:
        return False

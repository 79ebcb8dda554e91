"""What a run reads: the sources of its recipe as a feed, and the windows that it is measured on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openxlstm.data.feed import Feed
from openxlstm.data.prepare import open_source
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.data.tokens import TokenFolder
from openxlstm.data.windows import Stream
from openxlstm.train.config import FILES
from openxlstm.train.recipe import Recipe

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sources:
    """Token folders, opened and checked, as feed and as windows."""

    feed: Feed
    valid: Stream  # decides which checkpoint is best
    test: Stream | None  # read once, at the very end; None if no source has such a split
    sets: dict[str, Stream]  # further validation sets by name
    prepared: Path | None  # holds the folders train and test that `valid` and `test` belong to

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of everything that shapes the curve: results may be compared only where all are equal."""
        found = {"train": self.feed.fingerprint, "valid": self.valid.folder.fingerprint}
        return found if self.test is None else found | {"test": self.test.folder.fingerprint}


def open_sources(
    recipe: Recipe, tokenizer: Tokenizer, cache: Path, skipped: tuple[tuple[int, int], ...], note: Note
) -> Sources:
    """Open what `recipe` reads, and prepare what is not prepared yet.

    The main validation set and the test split are those of the first source that has them; if none has a validation
    split, the first of `data.valid` takes its place. What further sources hold out becomes a set of its own.

    Args:
        cache: where prepared token folders and plans of packed windows are kept between runs.
        skipped: ranges of samples that this run has left out so far, besides those of the recipe.
        note: is told, in a sentence, what takes a while.

    Raises:
        ValueError: a source is missing, damaged, too small, or written with another tokenizer.
    """
    data = recipe.data
    opened = [_splits(source.path, "source", tokenizer, cache, note) for source in data.mixture]
    for source, splits in zip(data.mixture, opened, strict=True):
        if "train" not in splits:
            raise ValueError(f"{source.path} has nothing to train on: its splits are {', '.join(splits)}")
    feed = Feed.open(
        [(splits["train"], source.weight) for source, splits in zip(data.mixture, opened, strict=True)],
        seed=recipe.train.seed,
        window=data.window,
        context=data.context,
        batch=recipe.train.batch,
        phases=[(phase.from_step, phase.weights) for phase in data.phase],
        skipped=[*data.skip, *skipped],
        cache=cache,
    )
    held = {
        name: Stream(splits["valid"], data.context)
        for name, splits in zip(_names([source.path for source in data.mixture]), opened, strict=True)
        if "valid" in splits
    }
    for name, path in data.valid.items():
        splits = _splits(path, f"data.valid.{name}", tokenizer, cache, note)
        held[name] = Stream(splits.get("valid", next(iter(splits.values()))), data.context)
    if not held:
        raise ValueError(
            f"{data.mixture[0].path} has no validation split, so nothing would say whether the run learns; prepare it"
            ' with one, or name a set: data.valid = { held_out = "PATH" }'
        )
    (_, valid), *sets = held.items()
    test = next((splits["test"] for splits in opened if "test" in splits), None)
    return Sources(
        feed=feed,
        valid=valid,
        test=None if test is None else Stream(test, data.context),
        sets=dict(sets),
        prepared=test.path.parent if test is not None and len(opened) == 1 else None,
    )


def check_exist(recipe: Recipe, where: Callable[[str], str]) -> None:
    """Refuse a source that is not there, before anything else is done.

    Raises:
        ValueError: with the path; `where` says who named it.
    """
    key = "data.corpus" if recipe.data.sources is None else "data.sources"
    said = [(key, source.path) for source in recipe.data.mixture]
    for key, path in [*said, *((f"data.valid.{name}", path) for name, path in recipe.data.valid.items())]:
        if path != FILES["data.corpus"] and not Path(path).exists():
            raise ValueError(
                f'{where(key)}: {key} = "{path}" is no folder and no file; name one, or "stdlib", or make it with'
                f" xlstm prepare TEXTS --out {path}"
            )


def _splits(path: str, what: str, tokenizer: Tokenizer, cache: Path, note: Note) -> dict[str, TokenFolder]:
    def tell(split: str, done: int, total: int) -> None:
        if done == total:
            note(f"{split}: {total:,} documents are tokens now, in {cache}")

    splits = open_source(path, tokenizer, cache, progress=tell)
    if not splits:
        raise ValueError(f"{what} {path} holds no documents at all")
    if not all(folder.byte_level for folder in splits.values()):
        raise ValueError(
            f"the tokenizer's tokens do not spell the texts of {path} byte for byte (a normalizer, or an added space),"
            " so bits per byte would be wrong; take that out of it"
        )
    return splits


def _names(paths: list[str]) -> list[str]:
    """A name per source, the last part of its path; numbered where two are alike."""
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}-{index}" for index, stem in enumerate(stems)]

"""Recipes: units, parents, paths, models, and what may not change half-way."""

from pathlib import Path

import pytest

from openxlstm.models.accounting import count_parameters
from openxlstm.train import config, strict
from openxlstm.train.run import read_recipe

BASE = """
[model]
width = 16
heads = 2
pattern = "ms"
[data]
context = 50
[train]
steps = 40
batch = 6
[optim]
lr = 1e-3
"""
SHIPPED = sorted(path.stem for path in (Path(config.__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.toml"
    file.write_text(BASE)
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        read_recipe(str(file), overrides)
    return str(caught.value)


def resolved(file: Path) -> config.Recipe:
    """Without the tokenizer, which the published recipes expect where the user keeps it."""
    return config.resolve(*config.load(file), vocab_size=1)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_resolves_and_prints_itself(name: str, tmp_path: Path) -> None:
    recipe = resolved(config.find(name))
    recipe.schedule()
    again = tmp_path / "again.toml"
    again.write_text(strict.write_toml(recipe.to_dict()))
    assert resolved(again) == recipe, "what --print shows is the recipe"


def test_units_become_integers(base: Path) -> None:
    steps = lambda *overrides: read_recipe(str(base), overrides)[0].train.steps
    assert steps() == 40
    assert steps("train.tokens=3_001") == 11  # 300 tokens a step, rounded up
    assert steps("train.tokens=1.5M") == 5000
    recipe, _ = read_recipe(str(base), ["train.tokens=20x"])
    assert recipe.train.steps == -(-20 * count_parameters(recipe.model_config()) // 300)
    schedule = read_recipe(str(base), ["optim.schedule.warmup=10%", "optim.schedule.cooldown=0.5%"])[0].schedule()
    assert (schedule.warmup, schedule.cooldown, schedule.end) == (4, 1, 40)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.tokens=2 B", 'train.tokens = \'2 B\' must be a number, such as 2_000_000, "300M", "2B" or "20x"'),
        ("train.tokens=0", 'train.tokens = 0 must be a number, such as 2_000_000, "300M", "2B" or "20x"'),
        ("optim.schedule.warmup=x", "optim.schedule.warmup = 'x' must be steps, such as 100, or a share, such as"),
        ("optim.schedule.warmup=41", "optim.schedule: warmup=41 and cooldown=0 must fit into the 40 steps of the run"),
        ("train.micro_batch=4", "train.micro_batch=4 must divide batch=6; nearest is 3"),
        (
            "train.precision=bf61",
            "train.precision = 'bf61' must be one of 'auto', 'fp32', 'bf16', 'fp64'; did you mean 'bf16'?",
        ),
        ("optim.lr=0", "optim.lr=0.0 must be above 0"),
        ("optim.betas=[0.9, 1.0]", "optim.betas=[0.9, 1.0] must be at least 0 and below 1; (0.9, 0.95) is usual"),
        ("model.architecture=xlstn", "model.architecture = 'xlstn' is unknown; did you mean 'xlstm'?"),
        ("model.preset=xlstm-125", "model.preset = 'xlstm-125' is unknown; did you mean 'xlstm-125m'?"),
        ("model.vocab_size=256", "model.vocab_size = 256 must hold the tokenizer's 257 entries; leave it out to use"),
        ("data.corpus=nowhere", 'nowhere" is no folder and no file; name one, or "stdlib"'),
        ("data.tokenizer=nowhere.json", "data.tokenizer: "),
        ("data.sources=[]", "data.sources=[] must name at least one source"),
        ('data.sources=[{ paht = "stdlib" }]', "data.sources[0] has no field 'paht'; did you mean 'path'?"),
        (
            'data.sources=[{ path = "stdlib", weight = -1 }]',
            "data.sources[0].weight=-1.0 must be at least 0 and finite",
        ),
        (
            'data.sources=[{ path = "stdlib", weight = 0 }]',
            "data.sources=['stdlib'] all have weight 0; give one of them",
        ),
        ("data.phase=[{ from_step = 4, weights = [1, 2] }]", "data.phase=[1.0, 2.0] has 2 weights, and there are 1"),
        ("data.phase=[{ from_step = 4, weights = [0] }]", "data.phase[0].weights=[0.0] must be at least 0, finite"),
        ("data.skip=[[3, 3]]", "data.skip=[3, 3] must be a range of samples, from 0 on"),
        ("data.skip=[3]", "data.skip = [3] must be a list, and each of its items a list of 2 numbers"),
        ("data.valid.a=3", "data.valid = {'a': 3} must be a table of texts"),
        ("data.window=lane", "did you mean 'lanes'?"),
        ("train.batch=[[2, 6]]", "train.batch=[[2, 6]] must begin at step 0, as in [[0, 128], [2000, 256]]"),
        ("train.batch=[[0, 6], [9, 12], [9, 18]]", "train.batch=[0, 9, 9] must be steps in rising order"),
        ("train.batch=six", "train.batch = 'six' must be a whole number or a list, and each of its items a list of 2"),
        ("train.shard=0", "train.shard=0 must be at least 1"),
        ("train.stop_after=0", "train.stop_after=0.0 must be above 0 and finite; leave it out for no limit"),
        ("loss.chunk=0", "loss.chunk=0 must be at least 1"),
        ("loss.z_loss=-1", "loss.z_loss=-1.0 must be at least 0 and finite"),
        ("optim.ema=1", "optim.ema=1.0 must be above 0 and below 1"),
        ("guard.spike=jump", "guard.spike = 'jump' must be one of 'log', 'skip', 'rollback', 'stop'"),
        ("guard.deviations=0", "guard.deviations=0.0 must be above 0"),
        ("checkpoint.keep_every=0", "checkpoint.keep_every=0 must be at least 1"),
        ("evaluate.lengths=[512, 0]", "evaluate.lengths=0 must be at least 1"),
        ("log.gates_every=-1", "log.gates_every=-1 must be at least 0"),
    ],
)
def test_what_cannot_run_is_a_sentence(base: Path, override: str, sentence: str) -> None:
    said = refusal(base, override)
    assert sentence in said, said
    assert said.startswith("command line: "), "the sentence names who said it"


def test_a_source_is_said_in_one_way(base: Path) -> None:
    sources = 'data.sources=[{ path = "stdlib" }]'
    assert "data.corpus and data.sources say one thing in two ways" in refusal(base, "data.corpus=stdlib", sources)
    base.write_text(BASE.replace("[data]\n", '[data]\ncorpus = "stdlib"\n'))
    assert read_recipe(str(base), [sources])[0].data.corpus is None, "what is said later replaces what was said earlier"


def test_lists_and_tables_of_the_command_line_read_back(base: Path, tmp_path: Path) -> None:
    """Everything that a recipe can hold, through --print and back."""
    said = (
        'data.sources=[{ path = "stdlib", weight = 3 }, { path = "stdlib" }]',
        "data.phase=[{ from_step = 20, weights = [1, 0] }]",
        'data.valid={ other = "stdlib" }',
        "data.skip=[[0, 7], [60, 66]]",
        "train.batch=[[0, 6], [10, 12]]",
        "optim.schedule.warmup=3",
        'optim.schedule={ kind = "linear", floor = 0.5 }',
        "evaluate.lengths=[100, 200]",
        'evaluate.samples=["def ", "a \\"quoted\\" one"]',
    )
    recipe, _ = read_recipe(str(base), said)
    assert [source.weight for source in recipe.data.mixture] == [3.0, 1.0]
    assert recipe.train.ramp == ((0, 6), (10, 12))
    assert (recipe.optim.schedule.warmup, recipe.optim.schedule.kind, recipe.optim.schedule.floor) == (3, "linear", 0.5)
    again = tmp_path / "again.toml"
    again.write_text(strict.write_toml(recipe.to_dict()))
    assert read_recipe(str(again))[0] == recipe


@pytest.mark.parametrize("tokens", [1, 299, 300, 301, 3_000, 3_001, 3_601, 9_000])
def test_a_ramp_of_batches_reaches_its_tokens(base: Path, tokens: int) -> None:
    """By brute force: 6 rows of 50 for ten steps, then 12."""
    recipe, _ = read_recipe(str(base), ["train.batch=[[0, 6], [10, 12]]", f"train.tokens={tokens}"])
    steps, rows = 0, 0
    while rows * 50 < tokens:
        rows += 6 if steps < 10 else 12
        steps += 1
    assert recipe.train.steps == steps
    assert recipe.train.rows(steps) == rows


def test_a_model_that_cannot_be_built_is_named_by_file(base: Path) -> None:
    base.write_text(BASE.replace("heads = 2", "heds = 2"))
    assert refusal(base).startswith("base.toml: model: ")
    assert "heads" in refusal(base)


def test_a_run_needs_a_length(base: Path) -> None:
    base.write_text(BASE.replace("steps = 40\n", ""))
    assert refusal(base) == 'base.toml: train needs steps = 1_000, or tokens = "2B", or tokens = "20x"'


def test_a_preset_is_a_starting_point(base: Path) -> None:
    base.write_text(BASE.replace('width = 16\nheads = 2\npattern = "ms"', 'preset = "xlstm-125m"\ndropout = 0.1'))
    recipe, tokenizer = read_recipe(str(base))
    model = recipe.model_config()
    assert (model.width, model.dropout, model.vocab_size) == (768, 0.1, tokenizer.vocab_size)


def test_children_refine_their_parents(base: Path) -> None:
    child = base.parent / "inner" / "child.toml"
    child.parent.mkdir()
    child.write_text('extends = "../base.toml"\n[train]\ntokens = "3K"\n[optim]\nbetas = [0.5, 0.6]\n')
    recipe, _ = read_recipe(str(child), ["optim.lr=2e-3"])
    assert (recipe.train.steps, recipe.train.batch) == (10, 6)  # tokens said later replace steps said earlier
    assert (recipe.optim.lr, recipe.optim.betas) == (2e-3, (0.5, 0.6))
    child.write_text('extends = "../base.toml"\n[optim]\nlrr = 1\n')
    assert refusal(child) == "child.toml: optim has no field 'lrr'; did you mean 'lr'?"
    base.write_text(BASE.replace("lr =", "rl ="))
    child.write_text('extends = "../base.toml"\n')
    assert refusal(child).startswith("base.toml: optim has no field 'rl'")


def test_a_circle_of_parents_is_refused(base: Path) -> None:
    base.write_text('extends = "base.toml"\n' + BASE)
    assert "extends goes in a circle: base.toml -> base.toml" in refusal(base)


def test_paths_count_from_who_said_them(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "else" / "texts").mkdir(parents=True)
    base.write_text(BASE.replace("[data]\n", '[data]\ncorpus = "texts"\n'))
    monkeypatch.chdir(tmp_path / "else")
    assert read_recipe(str(base))[0].data.corpus == str(tmp_path / "texts")
    assert read_recipe(str(base), ["data.corpus=texts"])[0].data.corpus == str(tmp_path / "else" / "texts")


def test_an_unknown_recipe_gets_the_list() -> None:
    with pytest.raises(ValueError, match="stdlib-demo"):
        config.find("stdlib-deno")


def test_model_data_and_optimiser_are_frozen(base: Path) -> None:
    before = read_recipe(str(base))[0].to_dict()
    after = read_recipe(str(base), ["optim.lr=2e-3", "train.batch=12", "train.steps=80", "evaluate.every=7"])[
        0
    ].to_dict()
    assert config.changed_frozen(before, after) == {"optim.lr": [1e-3, 2e-3], "train.batch": [6, 12]}
    assert config.changed_frozen(before, after, ["optim"]) == {"train.batch": [6, 12]}
    assert config.changed_frozen(before, after, ["optim.lr", "train.batch"]) == {}
    assert config.changed_frozen(before, after | {"data": before["data"] | {"valid": {"a": "stdlib"}}}, ["optim.lr"])
    with pytest.raises(ValueError, match=r"--allow = 'optim.rl' is unknown; did you mean 'optim.lr'\?"):
        config.changed_frozen(before, after, ["optim.rl"])
    assert config.changed(before, after)["train.steps"] == [40, 80]


def test_a_recipe_of_an_earlier_version_gets_the_defaults_of_this_one(base: Path) -> None:
    now = read_recipe(str(base))[0].to_dict()
    older = {key: value for key, value in now.items() if key not in ("guard", "log", "loss")}
    older["data"] = {key: value for key, value in now["data"].items() if key in ("corpus", "tokenizer", "context")}
    assert config.completed(older, "resolved.json") == now
    with pytest.raises(ValueError, match=r"^resolved.json: a recipe has no field 'modle'; did you mean 'model'"):
        config.completed(older | {"modle": {}}, "resolved.json")

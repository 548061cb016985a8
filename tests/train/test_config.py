"""Config: one place for options; TOML round trips exactly; whatever does not fit is one sentence."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.optim.clip import CLIP_KINDS
from fewbits.optim.schedule import SCHEDULE_KINDS
from fewbits.precision.kinds import MASTERS, MOMENTS
from fewbits.train.aliases import CONVERSIONS, RENAMES, apply_options, canonical, spellings
from fewbits.train.config import Config, full_name, load_recipe, options, override, recipes, short_names
from fewbits.train.fields import Option
from fewbits.train.room import least_bytes, refuse_oversize


def values(option: Option) -> st.SearchStrategy:
    """Values that fit an option, whatever its kind."""
    if option.choices:
        found = st.sampled_from(option.choices)
    elif option.kind is bool:
        found = st.booleans()
    elif option.kind is int:
        low, high = int(option.low or 0), int(option.high or 2**31 - 1)
        found = st.integers(low, high)
    elif option.kind is float:
        found = st.floats(option.low, option.high, exclude_min=option.above, exclude_max=option.below, allow_nan=False)
        found = found if option.high is not None else st.floats(allow_nan=False, allow_infinity=False)
    else:
        found = st.text(st.characters(exclude_categories=["Cs"]))  # no half of a surrogate pair: UTF-8 has none
    return st.none() | found if option.optional else found


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_toml_reads_back_to_an_equal_config_for_any_values_that_fit(data):
    names = data.draw(st.lists(st.sampled_from(sorted(options())), max_size=8, unique=True))
    config = Config()
    for name in names:
        group, _, key = name.rpartition(".")
        value = data.draw(values(options()[name]), label=name)
        inner = getattr(config, group) if group else config
        inner = dataclasses.replace(inner, **{key: value})
        config = dataclasses.replace(config, **{group: inner}) if group else inner
    assert Config.from_toml(config.to_toml()) == config


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_checked_and_round_trips(name):
    config = load_recipe(name).check()
    assert config.name == name
    assert Config.from_toml(config.to_toml()) == config


def test_the_recipes_have_the_shapes_they_are_named_after():
    sizes = {name: load_recipe(name).resolve_vocabulary(1).model.parameter_count() for name in recipes()}
    assert 124e6 < sizes["gpt2-124m"] < 125e6
    assert 1.0e9 < sizes["llama-1b"] < 1.2e9
    assert 63e6 < sizes["minimind-64m"] < 65e6
    shakespeare = load_recipe("shakespeare-char")
    model, train = shakespeare.model, shakespeare.train
    assert (model.n_layer, model.n_embd, model.context, model.dropout, train.max_steps) == (6, 384, 256, 0.2, 5000)


def test_every_option_has_one_sentence_for_help():
    for option in options().values():
        assert option.sentence.endswith("."), option.name
        assert len(option.sentence) < 200, option.name


def test_short_names_are_unambiguous_and_dashes_are_underscores():
    assert set(short_names().values()) <= set(options())
    assert full_name("optim.lr") == full_name("--lr") == "optim.lr"
    assert full_name("--micro-batches") == "train.micro_batches"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_steps", "1e3", 1000),
        ("max_steps", "1_000", 1000),
        ("lr", "3e-4", 3e-4),
        ("lr", "1", 1.0),
        ("bias", "False", False),
        ("tied", "on", True),
        ("compile", "True", "true"),
        ("encoding", "none", None),
        ("clip_kind", "INF", "inf"),
        ("prompt", " def ", " def "),
    ],
)
def test_a_text_from_the_command_line_means_what_people_mean(name, text, value):
    group, _, key = full_name(name).rpartition(".")
    assert getattr(getattr(override(Config(), name, text), group), key) == value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("lr", "nan", "at least 0"),
        ("lr", "-1", "at least 0"),
        ("lr", "inf", "number"),
        ("lr", "fast", "number"),
        ("max_steps", "1.5", "whole number"),
        ("max_steps", "0", "at least 1"),
        ("batch_size", "-8", "at least 1"),
        ("batch_size", "1e12", "at most"),
        ("batch_size", "1e9", "tokens a step"),
        ("micro_batches", "3", "1, 2, 4"),
        ("n_head", "5", "does not divide the width"),
        ("n_head", "0", "n_head"),
        ("n_layer", "-1", "at least 1 and at most 10,000"),
        ("n_embd", "1e30", "at least 1 and at most 1,000,000"),
        ("norm_eps", "nan", "a number at least 0 and at most 1"),
        ("vocab_size", "-1", "at least 0 and at most 10,000,000"),
        ("n_embd", "1000000", "parameters"),
        ("dropout", "nan", "dropout"),
        ("dropout", "1.5", "dropout"),
        ("bias", "maybe", "true or false"),
        ("clip_kind", "nrm", "Did you mean 'norm'"),
        ("optimizer", "adamv", "Did you mean 'adam"),
        ("schedule", "wsd", "--decay_steps"),
        ("stop_at", "10000", "beyond max_steps"),
        ("seed", "-1", "at least 0"),
        ("device", "gpu", "cpu, cuda"),
        ("device", "cuda:x", "cuda:N"),
        ("loss_scale", "static:1000", "power of two"),
        ("loss_scale", "dynamc", "loss"),
        ("precision", "bf16-mixd", "Did you mean 'bf16-mixed'"),
        ("master", "half", "fp32, split, none"),
        ("data", "", "empty"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_would(name, text, says):
    with pytest.raises(FewbitsError) as error:
        override(load_recipe("nano"), name, text).check()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr = 3", "Did you mean 'optim.lr'"),
        ("[optim]\nlrr = 3", "Did you mean 'optim.lr'"),
        ("[optimm]\nlr = 3", "Did you mean 'optim.lr'"),
        ("[optim]\nlr = '3'", "must be a number"),
        ("[train]\nmax_steps = 3.0", "whole number"),
        ("[train]\nmax_steps = true", "whole number"),
        ("[model]\nbias = 1", "true or false"),
        ("[data.data]\nx = 1", "data.data"),
        ("schema = 99", "reads 1"),
        ("learn well", "not TOML"),
    ],
)
def test_a_toml_file_is_read_strictly_and_named_in_the_error(text, says):
    with pytest.raises(FewbitsError, match=r"mine\.toml") as error:
        Config.from_toml(text, source="mine.toml")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("word", "says"), [("nanoo", "Did you mean 'nano'"), ("no/where.toml", "Cannot read"), ("x.toml", "Cannot read")]
)
def test_an_unknown_recipe_names_the_nearest(word, says):
    with pytest.raises(FewbitsError, match=says):
        load_recipe(word)


def test_a_recipe_of_ones_own_is_named_after_its_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[optim]\nlr = 1\n", encoding="utf-8")
    assert (load_recipe(path).name, load_recipe(path).optim.lr) == ("mine", 1.0)


def test_precision_options_win_over_the_precision_text():
    config, _ = apply_options(Config(), {"precision": "bf16-mixed", "master": "fp32", "loss_scale": "static:1024"})
    precision = config.resolve_precision()
    assert (precision.master, precision.loss_scale) == ("fp32", "static:1024")
    assert Config().resolve_precision("fp32").name == "fp32"


def test_the_vocabulary_comes_from_the_tokenizer_unless_given():
    assert Config().resolve_vocabulary(4096).model.vocab_size == 4096
    padded = override(Config(), "vocab_size", "50304")
    assert padded.resolve_vocabulary(50257).model.vocab_size == 50304
    with pytest.raises(FewbitsError, match="at least 60000, or 0"):
        padded.resolve_vocabulary(60000)


def test_every_alias_leads_to_an_option_and_hides_none():
    assert set(RENAMES.values()) <= set(options())
    assert not (RENAMES.keys() | CONVERSIONS.keys()) & (short_names().keys() | options().keys())
    for name in options():
        assert all(canonical(spelling) == name for spelling in spellings(name))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learning_rate": "1e-3", "min_lr": "1e-4"}, {"optim.lr": 1e-3, "optim.min_lr_ratio": 0.1}),
        ({"min-lr": "3e-4", "lr": "3e-3"}, {"optim.min_lr_ratio": 0.1}),
        ({"block_size": "64", "max_iters": "7", "grad_clip": "0"}, {"model.context": 64, "train.max_steps": 7}),
        ({"batch_size": "12", "gradient_accumulation_steps": "40"}, {"train.batch_size": 480}),
        (
            {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "8"},
            {"train.batch_size": 32, "train.micro_batches": 8},
        ),
        ({"per_device_train_batch_size": "6"}, {"train.batch_size": 6, "train.micro_batches": 1}),
        ({"gradient_accumulation_steps": "4"}, {"train.batch_size": 32, "train.micro_batches": 4}),
        ({"max_iters": "100", "lr_decay_iters": "400"}, {"train.max_steps": 400, "train.stop_at": 100}),
        ({"lr_scheduler_type": "cosine"}, {"optim.schedule": "cosine", "optim.min_lr_ratio": 0.0}),
        (
            {"lr_scheduler_type": "linear", "min_lr_ratio": "0.5"},
            {"optim.schedule": "linear", "optim.min_lr_ratio": 0.5},
        ),
        ({"warmup_ratio": "0.1", "max_steps": "200"}, {"optim.warmup_steps": 20}),
        ({"dtype": "bfloat16"}, {"precision": "bf16-mixed"}),
        ({"dtype": "float16"}, {"precision": "fp16-mixed"}),
        ({"bf16": "true"}, {"precision": "bf16-mixed"}),
        ({"fp16": "false"}, {"precision": "auto"}),
        ({"torch_compile": "True", "output_dir": "x"}, {"train.compile": "true", "train.out_dir": "x"}),
        ({"hidden_size": "64", "num_hidden_layers": "3"}, {"model.n_embd": 64, "model.n_layer": 3}),
        ({"hidden_act": "silu", "rms_norm_eps": "1e-6"}, {"model.activation": "swiglu", "model.norm_eps": 1e-6}),
        ({"optim": "adamw_torch", "use_cpu": "yes"}, {"optim.optimizer": "adamw", "train.device": "cpu"}),
    ],
)
def test_names_of_other_libraries_keep_their_meaning(given, expected):
    config, notes = apply_options(load_recipe("nano"), given)
    for name, value in expected.items():
        found = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == pytest.approx(value) if isinstance(value, float) else found == value
    assert all(note.startswith("--") for note in notes)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"bf16": "true", "precision": "fp32"}, "both set precision"),
        ({"bf16": "true", "fp16": "true"}, "both set precision"),
        ({"lr": "1", "learning_rate": "2"}, "given twice"),
        ({"num_train_epochs": "3"}, "--max_steps"),
        ({"resume_from_checkpoint": "x"}, "--resume"),
        ({"lr_scheduler_type": "polynomial"}, "none of"),
        ({"lr_decay_iters": "100"}, "together"),
        ({"min_lr": "1"}, "above the peak"),
        ({"min_lr": "nan"}, "min_lr is nan"),
        ({"warmup_ratio": "2"}, r"^warmup_ratio is 2\.0; it must be a number at least 0 and at most 1"),
        ({"gradient_accumulation_steps": "0"}, "^gradient_accumulation_steps is 0"),
        ({"learning_rat": "1"}, "Did you mean 'learning_rate'"),
    ],
)
def test_an_alias_that_cannot_be_honoured_says_why(given, says):
    with pytest.raises(FewbitsError, match=says):
        apply_options(load_recipe("nano"), given)


def test_a_training_larger_than_the_machine_is_refused_before_it_starts():
    config = load_recipe("llama-1b")
    # AdamW in 16 bits: 2 for the weight, 2 for the gradient, 8 for the moments of 1.1e9 parameters
    assert least_bytes(config) > 12 * 1.1e9
    refuse_oversize(config, None)
    refuse_oversize(config, 10**12)
    with pytest.raises(FewbitsError, match=r"8\.0 GiB"):
        refuse_oversize(config, 8 * 2**30)


def test_the_kinds_that_options_offer_are_those_that_exist():
    offered = {name: options()[name].choices for name in ("optim.master", "optim.moments", "optim.schedule")}
    assert offered == {"optim.master": MASTERS, "optim.moments": MOMENTS, "optim.schedule": SCHEDULE_KINDS}
    assert options()["optim.clip_kind"].choices == CLIP_KINDS

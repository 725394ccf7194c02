"""The configuration: every option can be reached and is explained, and whatever is wrong with one
ends in one sentence.
"""

import dataclasses
import functools
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import configs
from pipeline.commands import NAMES, find, load
from pipeline.config.compose import build, choices, options_of
from pipeline.config.options import describe, to_dict
from pipeline.config.run import FreeBits, TrainConfig
from pipeline.errors import UserError

COMMANDS = {name: find(name).config for name in NAMES}

NEEDED = {
    **{command: ["model=somewhere"] for command in ("evaluate", "encode", "reconstruct", "sample")},
    **{command: ["model=somewhere"] for command in ("compress", "neighbours", "explore", "export")},
    "decompress": ["model=somewhere", "file=images.vlae"],
    "data": ["action=inspect"],
    "registry": ["action=list"],
    "index": ["dataset.name=theirs", "index.train=s3://bucket/{0..9}.tar"],
}
"""What a command does not start without."""

CONFIGS = Path(configs.__file__).parent
FILES = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.glob("**/*.yaml"))]
GROUPS = {"dataset", "model", "optim", "train", "search", "cluster", "experiment"}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and key != "space"
            else {prefix + key: value}
        )
    return found


def defaults(command: str) -> Any:
    return load(command, NEEDED.get(command, []))


@functools.cache
def groups_of(command: str) -> set[str]:
    return set(choices(command))


@functools.cache
def plain_defaults(command: str) -> dict[str, Any]:
    return to_dict(defaults(command))


def value_at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def refused(command: str, overrides: list[str]) -> str:
    """The sentence with which a configuration is refused."""
    with pytest.raises(UserError) as raised:
        load(command, overrides)
    return check_sentence(str(raised.value))


def refused_values(command: str, values: dict[str, Any]) -> str:
    """As ``refused``, with values that are not read from text: quicker."""
    with pytest.raises(UserError) as raised:
        build(COMMANDS[command], plain_defaults(command), values)
    return check_sentence(str(raised.value))


def check_sentence(sentence: str) -> str:
    assert sentence.strip()
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert not re.search(r"Traceback|\b[A-Z]\w*(Error|Exception)\b", sentence)
    return sentence


# --- what there is --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_from_its_yaml_and_passes_its_own_checks(command: str) -> None:
    config = defaults(command)
    assert type(config) is COMMANDS[command]
    assert defaults(command) == config  # loading leaves nothing behind


def test_the_yaml_files_are_those_of_the_commands_and_the_groups() -> None:
    assert {str(file.with_suffix("")) for file in FILES if len(file.parts) == 1} == set(COMMANDS)
    assert {file.parts[0] for file in FILES if len(file.parts) > 1} == GROUPS
    assert set().union(*map(groups_of, COMMANDS)) == GROUPS
    for group in GROUPS:
        assert [f"{group}/{name}.yaml" for name in options_of(group)] == [
            str(file) for file in FILES if file.parts[0] == group
        ]


@pytest.mark.parametrize("schema", COMMANDS.values())
def test_every_option_and_section_has_a_sentence_of_help(schema: type) -> None:
    def fields(cls: type) -> list[dataclasses.Field[Any]]:
        own = list(dataclasses.fields(cls))
        sections = [
            item.default_factory for item in own if dataclasses.is_dataclass(item.default_factory)
        ]
        return own + [
            item for nested in sections if isinstance(nested, type) for item in fields(nested)
        ]

    assert schema.__doc__
    for item in fields(schema):
        text = item.metadata.get("help", "")
        assert len(text.split()) >= 2, item.name
        assert "\n" not in text, item.name


@pytest.mark.parametrize("file", [file for file in FILES if len(file.parts) > 1], ids=str)
def test_every_key_of_a_groups_file_is_an_option_and_is_heeded(file: Path) -> None:
    group, name = file.parent.name, file.stem
    values = flat(OmegaConf.to_container(OmegaConf.load(CONFIGS / file)))  # type: ignore[arg-type]
    if set(values) == {"defaults"}:  # another file by another name
        assert all((CONFIGS / group / f"{each}.yaml").exists() for each in values["defaults"])
        return
    is_global = "@package _global_" in (CONFIGS / file).read_text()
    values = {key: value for key, value in values.items() if key != "defaults"}
    expected = values if is_global else {f"{group}.{key}": value for key, value in values.items()}
    assert expected or name == "auto"
    commands = [command for command in COMMANDS if group in groups_of(command)]
    for command in commands:
        assert set(expected) <= {key for key, _ in describe(COMMANDS[command])}
    command = commands[0]
    config = load(
        command,
        [
            f"{group}={name}",
            *([] if "name" in values or group != "dataset" else ["dataset.name=mine"]),
        ],
    )
    plain = flat(to_dict(config))
    assert {key: plain[key] for key in expected} == expected


def changed(key: str, item: dataclasses.Field[Any], value: Any) -> Any:
    """Another value for an option, which its checks allow if all other options change as well."""
    special = {
        "model.window": "7x4",
        "shard.channels": 3,
        "index.channels": 1,
        "search.space": {"model": {"window": ["full", "0x0"], "latents": [3], "flow_depth": [1]}},
        "search.objectives": ["min nll", "max rate_bits"],
        "search.constraints": ["nll <= 3.5"],
        "runs": ["/other/runs/one"],
        "storage.endpoint_url": "http://other:9000",
        "command": ["ls"],
    }
    if key in special:
        return special[key]
    if item.metadata["name"]:
        return f"other-{key}"
    if isinstance(value, Enum):
        return next(other for other in [*type(value)][::-1] if other is not value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 3
    if isinstance(value, float):
        return value / 2 or 0.25
    if isinstance(value, list):
        return value[::-1] or [f"/other/{key}"]
    if value is None:
        return 7 if re.search("int|float", str(item.type)) else "/other"
    return f"/other/{key}"


def as_text(value: Any) -> str:
    """How a value is written on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(as_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and " " in value:
        return f"'{value}'"
    return (
        str(value.value if isinstance(value, Enum) else value).lower()
        if isinstance(value, bool | Enum)
        else str(value)
    )


EXCLUSIVE = (
    "train.free_bits",
    "train.free_groups",
    "train.nested",
    "train.with_valid",
    "models",
)
"""What cannot be changed along with every other option."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_can_be_set_from_the_command_line(command: str) -> None:
    before = defaults(command)
    options = [
        (key, item)
        for key, item in describe(COMMANDS[command])
        if key not in {*EXCLUSIVE, "preset"}
    ]
    wanted = {key: changed(key, item, value_at(before, key)) for key, item in options}
    after = load(command, [f"{key}={as_text(value)}" for key, value in wanted.items()])
    for key, value in wanted.items():
        assert value != value_at(before, key), key
        assert value_at(after, key) == value, key


@pytest.mark.parametrize(
    ("command", "depths"),
    [("train", "model.flow_depth=1"), ("tune", "search.space.model.flow_depth=[0,1]")],
)
def test_options_that_exclude_each_other_can_be_set_one_by_one(command: str, depths: str) -> None:
    assert load(command, ["train.free_groups=4", depths]).train.free_groups == 4
    assert load(command, ["train.free_bits=soft"]).train.free_bits is FreeBits.soft
    assert load(command, ["train.nested=true", depths]).train.nested


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_survives_json(command: str) -> None:
    config = defaults(command)
    plain = json.loads(json.dumps(to_dict(config)))
    assert build(COMMANDS[command], plain, {}) == config


def test_an_experiment_is_laid_over_the_other_choices() -> None:
    assert load("train", []).dataset.binarization.value == "auto"
    assert load("train", ["experiment=static"]).dataset.binarization.value == "static"
    record = load("train", ["experiment=record"])
    assert (record.optim.algorithm.value, record.optim.learning_rate) == ("muon", 1e-3)
    assert load("train", ["experiment=record", "optim=adam"]).optim == load("train", []).optim


def test_the_last_of_several_overrides_of_one_option_counts() -> None:
    assert load("train", ["model.window=3x1", "model.window=full"]).model.window == "full"
    assert load("train", ["model=tiny", "model=fast"]) == load("train", ["model=fast"])


def test_a_value_beats_the_group_that_is_chosen_after_it() -> None:
    assert load("train", ["model.latents=5", "model=tiny"]).model.latents == 5


# --- what is wrong --------------------------------------------------------------------------------

MISTAKES: list[tuple[str, list[str], str]] = [
    # misspelt keys
    ("train", ["model.windw=3x1"], "model.windw is not an option; did you mean model.window?"),
    ("train", ["train.image=3"], "train.image is not an option; did you mean train.images?"),
    (
        "tune",
        ["search.num_trial=3"],
        "search.num_trial is not an option; did you mean search.num_trials?",
    ),
    ("shard", ["model.window=3x1"], "model.window is not an option"),
    ("train", ["zzz=1"], "zzz is not an option; see --help"),
    ("train", ["storage=here"], "storage is not an option; did you mean storage.root?"),
    ("train", ["model.window.x=1"], "model.window.x is not an option; did you mean model.window?"),
    ("train", ["hydra.run.dir=x"], "hydra.run.dir is not an option"),
    # groups
    (
        "train",
        ["model=huge"],
        (
            "'model=huge': there is no such model; choose one of auto, colour, fast, grey, large,"
            " paper_binary, paper_cifar, tiny"
        ),
    ),
    (
        "train",
        ["train=5"],
        "'train=5': there is no such train; choose one of brief, short, standard",
    ),
    (
        "train",
        ["model={window:3x1}"],
        (
            "there is no such model; choose one of auto, colour, fast, grey, large, paper_binary,"
            " paper_cifar, tiny"
        ),
    ),
    (
        "train",
        ["experiment=none"],
        "there is no such experiment; choose one of long, record, static, study",
    ),
    ("tune", ["dataset=imagenet"], "there is no such dataset; choose one of folder, idx, mnist"),
    # values of the wrong type
    ("train", ["train.images=many"], "train.images: Value 'many'"),
    ("train", ["train.images=1.5"], "train.images: Value '1.5'"),
    ("train", ["train.images=nan"], "train.images: Value 'nan'"),
    ("train", ["train.images=true"], "train.images: Value 'True'"),
    ("train", ["optim.learning_rate=fast"], "optim.learning_rate: Value 'fast'"),
    ("train", ["cluster.use_gpu=maybe"], "cluster.use_gpu: Value 'maybe'"),
    ("train", ["storage.root={a:1}"], "storage.root: "),
    ("tune", ["search.space.model.latents=[16,many]"], "search.space.model.latents: Value 'many'"),
    (
        "tune",
        ["search.space.model.latents=16"],
        "search.space.model.latents is 16; give a list of the values to choose from",
    ),
    (
        "tune",
        ["search.space.model.latents=['16']"],
        "search.space.model.latents: '16' would be read as 16; write 16",
    ),
    (
        "tune",
        ["search.space.model.latent=[16]"],
        "search.space.model.latent: model.latent is not an option; did you mean model.latents?",
    ),
    (
        "tune",
        ["search.space.model=16"],
        "search.space.model is 16; write search.space.model.window=[3x1,5x2]",
    ),
    (
        "tune",
        ["search.space.train.images=[1000,2000]"],
        "search.space.train.images: trials differ in options of model, optim and train",
    ),
    (
        "tune",
        ["search.space.cluster.num_workers=[1,2]"],
        "search.space.cluster.num_workers: trials differ in options of model, optim",
    ),
    (
        "tune",
        ["search.objectives=[]"],
        "search.objectives is empty; give at least one, such as 'min nll'",
    ),
    (
        "tune",
        ["search.objectives=[nll]"],
        "search.objectives: 'nll' is not understood; write min or max and one of nll, rate_bits, ",
    ),
    (
        "tune",
        ["search.objectives=[min loss]"],
        "search.objectives: 'min loss' is not understood; write min or max and one of nll, ",
    ),
    (
        "tune",
        ["search.objectives=[min nll,max nll]"],
        "search.objectives names nll twice; leave one out",
    ),
    (
        "tune",
        ["search.constraints=['20 < rate_bits']"],
        "search.constraints: '20 < rate_bits' is not understood; write bounds like",
    ),
    (
        "tune",
        ["search.constraints=['60 <= rate_bits <= 20']"],
        "search.constraints: '60 <= rate_bits <= 20' cannot be met: its lower",
    ),
    (
        "tune",
        ["search.objectives=[max probe_accuracy]", "search.constraints=[]"],
        (
            "search.stopping=asha compares trials while they run, when only nll, rate_bits,"
            " distortion_nats are known: make one of them"
        ),
    ),
    (
        "tune",
        ["search.objectives=[max probe_accuracy,min nll]", "search.probe_images=0"],
        "search.probe_images=0 fits no probe, but probe_accuracy is searched for; raise it",
    ),
    (
        "train",
        ["dataset.source=ftp"],
        "dataset.source: Invalid value 'ftp', expected one of [mnist, idx, folder, npz, ",
    ),
    (
        "tune",
        ["search.sampler=best"],
        "search.sampler: Invalid value 'best', expected one of [tpe, random, grid]",
    ),
    # values that are missing
    ("index", ["dataset.name=x"], "index.train is needed; give index.train=VALUE"),
    ("evaluate", [], "model is needed; give model=VALUE"),
    ("shard", ["dataset=idx"], "dataset.name is needed; give dataset.name=VALUE"),
    ("train", ["train.images=???"], "train.images is needed; give train.images=VALUE"),
    # what Hydra has, and this has not
    ("train", ["+x=1"], "'+x=1' is not understood; write plain key=value"),
    (
        "train",
        ["++model.window=full"],
        "'++model.window=full' is not understood; write plain key=value",
    ),
    ("train", ["~model"], "'~model' is not understood; write plain key=value"),
    ("train", ["~model.window"], "'~model.window' is not understood; write plain key=value"),
    (
        "train",
        ["model.window=3x1,5x2"],
        "'model.window=3x1,5x2' is not understood; write plain key=value (to try many values, use",
    ),
    (
        "train",
        ["model=tiny,fast"],
        (
            "'model=tiny,fast' is not understood; write plain key=value (to try many values, use"
            " vlae tune)"
        ),
    ),
    (
        "train",
        ["train.seed=range(1,3)"],
        "is not understood; write plain key=value (to try many values, use vlae tune)",
    ),
    ("train", ["model@other=fast"], "'model@other=fast' is not understood"),
    # what is no override at all
    ("train", ["model.window"], "'model.window' is not understood; write key=value"),
    ("train", [""], "'' is not understood; write key=value"),
    (
        "train",
        ["name='open"],
        "is not understood; write key=value, and quote a value of odd characters",
    ),
    (
        "train",
        ["name=a=b"],
        "is not understood; write key=value, and quote a value of odd characters",
    ),
    # interpolations that lead nowhere
    ("train", ["name=${nothing}"], "name: Interpolation key 'nothing' not found"),
    ("train", ["name=${name}"], "name: Recursive interpolation detected"),
]


@pytest.mark.parametrize(
    ("command", "overrides", "sentence"),
    MISTAKES,
    ids=[" ".join(case[1]) or "none" for case in MISTAKES],
)
def test_a_mistake_ends_in_one_sentence_that_says_what_to_do(
    command: str, overrides: list[str], sentence: str
) -> None:
    assert sentence in refused(command, overrides)


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    # combinations that cannot be
    (
        "train",
        {"cluster.num_workers": 9},
        "cluster.num_workers=9, but the data is dealt to train.num_streams=8 streams",
    ),
    (
        "train",
        {"cluster.num_workers": [1, 9]},
        "cluster.num_workers=9, but the data is dealt to train.num_streams=8 streams",
    ),
    (
        "train",
        {"cluster.num_workers": [3, 2]},
        "cluster.num_workers is [3, 2]; it must be at least 1, or a range [MIN,MAX] of such"
        " numbers",
    ),
    ("train", {"cluster.num_workers": [1, 2, 3]}, "cluster.num_workers is [1, 2, 3]; it must"),
    ("train", {"cluster.num_workers": "two"}, "cluster.num_workers is two; it must"),
    ("train", {"cluster.num_workers": None}, "cluster.num_workers is None; it must"),
    (
        "train",
        {"train.num_streams": 7},
        "train.global_batch=16 cannot be shared by train.num_streams=7 streams; use a batch that",
    ),
    (
        "tune",
        {"train.global_batch": 12},
        "cannot be shared by train.num_streams=8 streams; use a batch that is a multiple of 8",
    ),
    (
        "train",
        {"train.images": 15},
        "train.images=15 is less than one batch of train.global_batch=16",
    ),
    (
        "train",
        {"model.window": "big"},
        "model.window: window 'big' is not understood; use 0x0, full, or WIDTHxHEIGHT such as 5x2",
    ),
    ("train", {"model.window": 3}, "model.window: window '3' is not understood"),
    ("train", {"model.window": "0x3"}, "model.window: window 0x3 "),
    (
        "tune",
        {"search.space.model.window": ["5x2", "big"]},
        "model.window: window 'big' is not understood",
    ),
    (
        "train",
        {"model.flow_hidden": 30},
        "model.flow_hidden=30 is too narrow for model.latents of 32: it must be at least 31",
    ),
    (
        "train",
        {"train.free_groups": 5, "model.flow_depth": 0},
        "train.free_groups=5 does not divide a code of 32 latents; use",
    ),
    (
        "tune",
        {
            "train.free_groups": 8,
            "search.space.model.latents": [16, 20],
            "search.space.model.flow_depth": [0],
        },
        "train.free_groups=8 does not divide a code of 20 latents; use",
    ),
    (
        "train",
        {"train.free_groups": 4},
        "a flow of more than one step does not; use train.free_groups=1, or flow",
    ),
    (
        "tune",
        {"train.free_groups": 4, "model.flow_depth": 0},
        "a flow of more than one step does not; use train.free_groups=1",
    ),
    (
        "train",
        {"train.nested": True},
        "with model.flow_depth=2 these have no density of their own; use model.flow_depth=0 or 1",
    ),
    (
        "train",
        {
            "train.nested": True,
            "model.flow_depth": 1,
            "model.posterior_depth": 1,
            "model.code": "maps",
        },
        "but with model.posterior_depth=1, model.code=maps these have no density",
    ),
    (
        "tune",
        {"train.nested": True, "search.space.model.flow_depth": [0, 1, 3]},
        "with model.flow_depth=3 these have no density of their own",
    ),
    (
        "train",
        {"train.nested": True, "train.free_groups": 4, "model.flow_depth": 1},
        "train.nested=true sends the last latents seldom",
    ),
    (
        "tune",
        {"train.with_valid": True},
        "which a search compares its models on; search without it, then train the best model",
    ),
    (
        "train",
        {"train.free_bits": "soft", "train.free_nats": 0},
        "soft needs a target for the rate; give train.free_nats above 0",
    ),
    (
        "train",
        {"train.free_bits": "soft", "train.free_groups": 2},
        "train.free_groups divides the floor of train.free_bits=hard",
    ),
    (
        "train",
        {"train.free_bits": "soft", "train.rate_warmup_fraction": 0.1},
        "leave train.rate_warmup_fraction at 0",
    ),
    # sizes that no memory holds, and numbers that no integer of 64 bits does
    (
        "plan",
        {"num_images": 10**20},
        "num_images is 100000000000000000000; it must be a number of 64",
    ),
    (
        "plan",
        {"num_images": 10**18},
        "num_images is 1000000000000000000; it must be at least 1, and",
    ),
    (
        "plan",
        {"image_size": 10**6},
        "image_size is 1000000; it must be at least 1, and below 16384",
    ),
    ("plan", {"num_workers": [1, 10**9]}, "its numbers must be at least 1, and below 2^20"),
    ("train", {"model.latents": 10**9}, "model.latents is 1000000000; it must be at least 1, and"),
    (
        "train",
        {"model.flow_depth": 10**6},
        "model.flow_depth is 1000000; it must be at least 0, and",
    ),
    ("train", {"train.images": 10**30}, "it must be a number of 64 bits"),
    (
        "train",
        {"train.global_batch": 10**9},
        "train.global_batch is 1000000000; it must be at least",
    ),
    ("evaluate", {"bounds.samples": 10**9}, "bounds.samples is 1000000000; it must be at least 1"),
    (
        "shard",
        {"shard.image_size": 10**6},
        "shard.image_size is 1000000; it must be at least 1, and",
    ),
    # ranges
    ("train", {"train.free_groups": 0}, "train.free_groups is 0; it must be at least 1"),
    ("train", {"cluster.num_workers": 0}, "cluster.num_workers is 0; it must be at least 1"),
    (
        "train",
        {"cluster.cpus_per_worker": 0},
        "cluster.cpus_per_worker is 0; it must be at least 1",
    ),
    ("train", {"cluster.max_failures": -1}, "cluster.max_failures is -1; it must be at least 0"),
    ("train", {"model.latents": 0}, "model.latents is 0; it must be at least 1"),
    ("train", {"model.flow_depth": -1}, "model.flow_depth is -1; it must be at least 0"),
    ("train", {"model.decoder_blocks": -1}, "model.decoder_blocks is -1; it must be at least 0"),
    ("train", {"optim.learning_rate": 0}, "optim.learning_rate is 0.0; it must be above 0"),
    ("train", {"optim.learning_rate": "nan"}, "optim.learning_rate is nan; it must be above 0"),
    ("train", {"optim.decay_fraction": 1.1}, "optim.decay_fraction is 1.1; it must be in 0..1"),
    ("train", {"optim.ema_decay": 1}, "optim.ema_decay is 1.0; it must be at least 0, and below 1"),
    ("train", {"optim.clip_norm": 0}, "optim.clip_norm is 0.0; it must be above 0"),
    ("train", {"train.num_streams": 0}, "train.num_streams is 0; it must be at least 1"),
    ("train", {"train.global_batch": 0}, "train.global_batch is 0; it must be at least 1"),
    ("train", {"train.keep_checkpoints": 0}, "train.keep_checkpoints is 0; it must be at least 1"),
    ("train", {"train.free_nats": -1}, "train.free_nats is -1.0; it must be at least 0"),
    ("train", {"train.free_fraction": 2}, "train.free_fraction is 2.0; it must be in 0..1"),
    (
        "tune",
        {"search.space.model.window": []},
        "search.space.model.window is []; give a list of the values to choose from",
    ),
    ("tune", {"search.space.model.latents": [0]}, "model.latents is 0; it must be at least 1"),
    (
        "tune",
        {"search.space.model.flow_depth": [-1]},
        "model.flow_depth is -1; it must be at least 0",
    ),
    (
        "tune",
        {"search.space.optim.learning_rate": [n / 1000 for n in range(1, 600)]},
        "search.space has 26,955 combinations; use fewer values",
    ),
    (
        "tune",
        {"search.space.model.latents": [16, 300], "search.space.model.flow_hidden": [256, 512]},
        "model.flow_hidden=256 is too narrow for model.latents of 300: it must be at least 299",
    ),
    ("tune", {"search.hours": 0}, "search.hours is 0.0; it must be above 0"),
    ("tune", {"search.core_hours": -1}, "search.core_hours is -1.0; it must be above 0"),
    ("tune", {"search.samples": 0}, "search.samples is 0; it must be at least 1"),
    ("tune", {"search.num_images": 1}, "search.num_images is 1; it must be at least 2"),
    ("tune", {"search.num_trials": 0}, "search.num_trials is 0; it must be at least 1"),
    (
        "tune",
        {"search.grace_fraction": 0},
        "search.grace_fraction is 0.0; it must be above 0, and at most 1",
    ),
    ("tune", {"search.reduction": 1}, "search.reduction is 1; it must be at least 2"),
    ("tune", {"register_best": 0}, "register_best is 0; it must be at least 1"),
    ("demo", {"bounds.samples": 0}, "bounds.samples is 0; it must be at least 1"),
    ("evaluate", {"probe_images": -1}, "probe_images is -1; it must be at least 0"),
    ("evaluate", {"bounds.num_images": 1}, "bounds.num_images is 1; it must be at least 2"),
    ("evaluate", {"bounds.pictures": 0}, "bounds.pictures is 0; it must be at least 1"),
    ("shard", {"shard.channels": 2}, "shard.channels is 2; it must be 1 (grey) or 3 (RGB)"),
    (
        "shard",
        {"shard.valid_fraction": 1},
        "shard.valid_fraction is 1.0; it must be above 0, and below 1",
    ),
    ("shard", {"shard.block_size": 0}, "shard.block_size is 0; it must be at least 1"),
]


@pytest.mark.parametrize(
    ("command", "values", "sentence"), IMPOSSIBLE, ids=[str(case[1]) for case in IMPOSSIBLE]
)
def test_what_cannot_be_is_refused_in_one_sentence_that_says_what_can(
    command: str, values: dict[str, Any], sentence: str
) -> None:
    assert sentence in refused_values(command, values)


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [(1, 1, 1), (7, 7, 7), (12, 12, 12), ([1, 12], 1, 12), ([3, 3], 3, 3)],
)
def test_any_number_of_workers_up_to_that_of_the_streams_will_do(
    given: Any, least: int, most: int
) -> None:
    values = {"train.num_streams": 12, "train.global_batch": 24, "cluster.num_workers": given}
    cluster = build(TrainConfig, plain_defaults("train"), values).cluster
    assert (cluster.min_workers, cluster.max_workers) == (least, most)


def test_a_flow_of_depth_zero_needs_no_width() -> None:
    values = {"model.flow_hidden": 1, "model.flow_depth": 0}
    assert build(TrainConfig, plain_defaults("train"), values).model.flow_depth == 0


NEVER_USABLE = [
    (
        "tune",
        {"search.space.model.latents": [16, 512]},
        "no flow of flow_hidden=256 can take 512 latents: it fails when its trial begins",
    ),
    ("train", {"storage.root": ""}, "the data set is then looked for in /datasets"),
    ("train", {"name": "../elsewhere"}, "the run is then kept outside runs/"),
    ("train", {"optim.learning_rate": "inf"}, "no loss stays finite"),
    ("train", {"train.report_seconds": "inf"}, "the loop fails at its first report"),
    ("train", {"train.seed": 1 << 64}, "torch.manual_seed takes no more than 64 bits"),
    ("serve-store", {"port": 65536}, "there is no such port"),
]


@pytest.mark.parametrize(
    ("command", "values"),
    [pytest.param(command, values, id=reason) for command, values, reason in NEVER_USABLE],
)
def test_a_value_that_no_run_can_use_is_refused(command: str, values: dict[str, Any]) -> None:
    refused_values(command, values)


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("train", {"train.images": None}),
        ("tune", {"search.space": 16}),
        ("tune", {"search.space.model.latents": {"a": 1}}),
        ("tune", {"search.space.model.window": [None]}),
        ("train", {"name": "${train}"}),
        ("train", {"name": "${oc.env:NO_SUCH_VARIABLE}"}),
    ],
    ids=str,
)
def test_a_sentence_speaks_of_options_not_of_classes(command: str, values: dict[str, Any]) -> None:
    sentence = refused_values(command, values)
    assert not re.search(
        r"Optional|NoneType|ListConfig|DictConfig|KeyError|InterpolationKey", sentence
    )


# --- where things are -----------------------------------------------------------------------------


def test_a_local_folder_is_absolute_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train = load("train", ["storage.root=things", "dataset.path=../pictures"])
    assert train.storage.root == str(tmp_path / "things")
    assert train.dataset.url == f"{tmp_path}/things/datasets/mnist"
    assert Path(train.dataset.path or "") == tmp_path / "../pictures"
    assert load("train", []).storage.root == str(tmp_path / "vlae-store")
    assert load("train", ["storage.root='~/things'"]).storage.root == str(
        tmp_path / "home" / "things"
    )
    assert load("train", ["storage.root=/things"]).storage.root == "/things"
    assert load("tune", ["storage.root=things"]).registry.artifacts == f"{tmp_path}/things/registry"
    assert load("evaluate", ["model=x", "output=here"]).output == str(tmp_path / "here")
    assert load("registry", ["action=list"]).output == str(tmp_path / "outputs/registry")
    assert load("serve-store", ["folder=objects"]).folder == str(tmp_path / "objects")
    assert load("demo", []).folder == str(tmp_path / "demo")
    assert load("demo", []).registry.uri == f"sqlite:///{tmp_path}/demo/registry.db"
    assert load("tune", []).registry.uri == f"sqlite:///{tmp_path}/vlae-registry.db"
    assert load("tune", ["registry.uri=http://server"]).registry.uri == "http://server"


@pytest.mark.parametrize("key", ["dataset.url", "registry.artifacts", "dataset_url"])
def test_other_folders_are_absolute_too(key: str) -> None:
    command = "evaluate" if key == "dataset_url" else "tune"
    config = build(COMMANDS[command], plain_defaults(command), {key: "things"})
    assert value_at(config, key) == str(Path("things").absolute())


@pytest.mark.parametrize("root", ["s3://bucket/some/prefix", "s3://bucket", "s3://bucket/~/x"])
def test_an_s3_address_is_left_as_it_is(root: str) -> None:
    config = load("tune", [f"storage.root='{root}'", "model=fast", "dataset.binarization=dynamic"])
    assert config.storage.root == root
    assert config.dataset.url == f"{root}/datasets/mnist"
    assert config.registry.artifacts == f"{root}/registry"


# --- what a run is --------------------------------------------------------------------------------

OF_NO_MATTER = re.compile(
    r"name|preset|(storage|cluster|registry)\..*|dataset\.(source|path|cache.*|max_skipped)"
    r"|train\.(keep_checkpoints|valid_.*|.*_seconds|micro_batch)"
)
"""What the weights of a run do not depend on; where its data is, is dataset.url."""


def test_a_run_is_another_exactly_if_something_changes_that_its_weights_depend_on() -> None:
    config = load("train", [])
    plain = to_dict(config)
    # Each alone must pass the checks: with these, twice or half of any is allowed.
    plain["train"] |= {"global_batch": 32, "num_streams": 16, "images": 64_000}
    plain["model"]["flow_depth"] = 1
    config = build(TrainConfig, plain, {})
    seen = [config.identity()]
    for key, item in describe(TrainConfig):
        other = build(TrainConfig, plain, {key: changed(key, item, value_at(config, key))})
        if OF_NO_MATTER.fullmatch(key):
            assert other.identity() == config.identity(), key
            assert key == "name" or other.run_name == config.run_name, key
        else:
            assert other.identity() not in seen, key
            assert other.run_name != config.run_name, key
            seen.append(other.identity())


def test_a_runs_identity_is_plain_json_and_survives_it() -> None:
    identity = load("train", []).identity()
    assert json.loads(json.dumps(identity)) == identity


def test_a_run_is_named_after_its_data_set_and_window_unless_it_is_given_a_name() -> None:
    assert re.fullmatch(r"mnist-7x4-[0-9a-f]{8}", load("train", ["model.window=7x4"]).run_name)
    assert load("train", ["name=mine"]).run_name == "mine"


# --- anything at all ------------------------------------------------------------------------------

SCHEMA_KEYS = [key for key, _ in describe(COMMANDS["tune"])]
KEYS = st.sampled_from([*SCHEMA_KEYS, *GROUPS, "x", "model.x", "_self_", "defaults", "hydra"])
VALUES = st.one_of(
    st.sampled_from(
        [
            "null",
            "???",
            "",
            "1",
            "-1",
            "1e30",
            "nan",
            "inf",
            "true",
            "tiny",
            "5x2",
            "[1,2]",
            "[[1]]",
            "{a:1}",
            "a,b",
        ]
    ),
    st.sampled_from(
        [
            "${name}",
            "${train}",
            "${x:y}",
            "'${'",
            "\\${a}",
            "int(1)",
            "glob(*)",
            "range(3)",
            "~/x",
            "s3://",
            "a/../b",
        ]
    ),
    st.text(max_size=8),
)
OVERRIDES = st.one_of(st.text(max_size=12), st.builds("{}={}".format, KEYS, VALUES))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


def load_or_refuse(overrides: list[str]) -> None:
    try:
        config = load("tune", overrides)
    except UserError as error:
        check_sentence(str(error))
    else:
        json.dumps(config.identity())


# Without shrinking, which at a tenth of a second for each attempt takes minutes.
some = settings(deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=null"],
        ["experiment=null"],
        ["storage.root='~no-such-user/x'"],
        ["search.space.model.window=[[5x2]]"],
        ["search.space.model.latents=[[16]]"],
        ["search.space.model.flow_depth=[{a:1}]"],
        ["search.space={model.window:[5x2]}"],
        ["search.space.model.latents.a=[16]"],
        ["dataset.url=\\${not.an.option}"],
    ],
    ids=str,
)
def test_odd_words_are_loaded_or_refused_in_one_sentence(overrides: list[str]) -> None:
    load_or_refuse(overrides)


@settings(some, max_examples=30)
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
@example(["=1"])
@example(["name='\x00'"])
@example(["train.images=${train}"])
@example(["model=null"])
def test_any_words_are_loaded_or_refused_in_one_sentence(overrides: list[str]) -> None:
    load_or_refuse(overrides)


@settings(some, max_examples=80)
@given(st.dictionaries(st.sampled_from(SCHEMA_KEYS), JSON, min_size=1, max_size=2))
@example({"search.space.model.window": [["5x2"]]})
def test_any_values_are_taken_or_refused_in_one_sentence(values: dict[str, Any]) -> None:
    try:
        config = build(COMMANDS["tune"], plain_defaults("tune"), values)
    except UserError as error:
        check_sentence(str(error))
    else:
        json.dumps(config.identity())

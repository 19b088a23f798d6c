"""What an experiment file may hold. Each section stands beside what it configures; this file composes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmalign import assets
from mmalign.config import Resolved, Section, Variants, decode, explain_yaml, json_schema, load_yaml
from mmalign.engine.settings import OptimConfig, RunConfig
from mmalign.errors import ConfigError, ModelError
from mmalign.freezing.settings import FreezingConfig
from mmalign.models.reference import REFERENCES
from mmalign.models.table import MODELS, reads_language
from mmalign.registry import Registry
from mmalign.trainers import METHODS

STORED_DRAWS = 8
"""Draws of a pair when its reference is precomputed and nothing else is said."""


class FullConfig(Section):
    """Train every weight of the network."""

    name: str = "full"
    vision: Literal["frozen", "projector", "trained"] = "frozen"
    """Vision-language models: keep tower and projector as they are, train the projector too, or both."""


class LoraConfig(Section):
    """Train low-rank adapters (arXiv:2106.09685); the network's own weights stay frozen."""

    name: str = "lora"
    rank: int = 8
    alpha: float | None = None
    """Scale of the adapter's output is alpha / rank; default alpha = rank."""
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "attention"
    """A set named by the family ('attention', 'all'), or a list of layer-name suffixes."""


class UserTuningConfig(Section):
    """Train the added attention of personalised methods alone; everything else stays frozen, and is its own reference."""

    name: str = "user"


TUNINGS: Registry[type[Section]] = Registry("tuning")
TUNINGS.add("full", FullConfig, summary="every weight of the network")
TUNINGS.add("user", UserTuningConfig, summary="the users' added attention alone", cite="arXiv:2501.06655")
TUNINGS.add("lora", LoraConfig, summary="low-rank adapters", cite="arXiv:2106.09685")


class DataConfig(Section):
    """Which preferences to learn from, and how pictures and captions are prepared."""

    manifest: str
    """Folder or file of the preference table (see 'mmalign data import')."""
    mix: tuple[str, ...] = ()
    """Methods on pairs: further tables, read together with `manifest`."""
    weights: tuple[float, ...] = ()
    """Share of `manifest` and of each table of `mix` in the rows; default: by their sizes."""
    mix_policy: Literal["stop", "repeat", "drop"] = "repeat"
    """An epoch ends before any table repeats ('stop'), or when every table was seen whole: small ones then repeat, or give no
    more rows than they have ('drop')."""
    resolution: int | None = None
    """Side of the square crop in pixels; default: the model's own."""
    buckets: bool = False
    """Methods on pairs: train in several shapes of about the same area, one shape a step, instead of cropping squares."""
    shuffle: bool | Literal["block"] = True
    """'block' mixes rows of a few places of the table at a time: for storage that is slow where one jumps."""
    max_per_prompt: int | None = None
    """Methods on pairs: most rows of one prompt in an epoch; its others come in the epochs after. Default: all."""
    long_prompts: Literal["cut", "drop"] = "cut"
    """Methods on pairs: what the text encoders do not read of a prompt is cut, and said, or the row is left out."""
    cache: str = "auto"
    """'auto': latents and text are encoded once and kept in the table's folder; 'off'; or a folder for the cache."""
    check: Literal["required", "online", "off"] = "online"
    """'required' refuses a table that 'mmalign data check' has not passed; 'online' checks before the first step."""
    ties: Literal["drop", "soft"] = "drop"
    """Leave undecided pairs out, or keep them with probability 0.5 (for objectives that use soft labels)."""
    max_bad_fraction: float = 0.01
    """Stop when more rows than this are refused for defects."""
    flip: bool = False
    """Mirror half of the pairs, both pictures alike."""
    crop: Literal["center", "random"] = "center"
    drop_caption: float = 0.0
    """Share of captions replaced by '' so that guidance keeps working; the released scripts use 0.2."""
    draws: int | None = None
    """How many stored draws (timestep, noise, augmentation) a pair has, taken in turn epoch by epoch; 0: a new draw at every
    step. Default: 0, and 8 with `reference: precomputed`, which asks the reference once for each."""
    max_length: int | None = None
    """Methods on answers: most tokens of a prompt with one answer, media included; answers are cut to fit, media never."""
    max_answer: int | None = None
    """Methods on answers: most tokens of an answer."""
    stage: str | None = None
    """Methods on answers: use the rows of this curriculum stage alone (column `stage`)."""
    cache_vision: bool = False
    """Methods on answers: keep the features of a frozen vision tower on disk (megabytes a picture for large models)."""
    cache_frames: bool = False
    """Methods on answers: keep the sampled frames of clips on disk, so that each clip is decoded once in all."""
    video_decoder: Literal["pyav", "torchcodec"] = "pyav"
    """Methods on answers: what decodes clips. torchcodec needs the extra of that name and FFmpeg's libraries on the system."""
    workers: int | Literal["auto"] = 2
    """Threads that get batches ready. 'auto' measures at the first batch how many pay, for at most two seconds, on up to one
    a core; whatever their number, batches are the same."""
    decode: Literal["threads", "processes"] = "threads"
    """Where pictures are decoded in training without caches: in `workers` threads, or in as many processes."""
    prefetch: int = 4
    """Batches prepared ahead."""


class ReportsConfig(Section):
    """Further figures where answers are reports with a reference each (docs/chest_xray.md)."""

    extractor: str = "cxr-findings"
    """Who reads findings: a name of `mmalign.rewards.findings.EXTRACTORS`, or package.module:Class."""
    overlap: tuple[Literal["bleu", "rouge-l", "bertscore"], ...] = ("bleu", "rouge-l", "bertscore")
    """Measures of words in common; those whose library or model is missing are named as absent."""
    bertscore_model: str | None = None
    """Folder or hub id of BERTScore's encoder."""


class EvaluateConfig(Section):
    """How aligned and base model are compared."""

    rewards: tuple[str, ...] = ()
    """Rewards to score with; the first is the headline."""
    holdout: tuple[str, ...] = ()
    """Judges that took no part in labelling, shown beside the rewards."""
    prompts: str | None = None
    """Text file with a prompt a line, or JSONL with 'prompt' and optional 'group'; default: no evaluation."""
    max_prompts: int | None = None
    images_per_prompt: int = 1
    steps: int = 50
    guidance: float = 7.5
    batch_size: int = 8
    every: int = 0
    """Write a grid of samples every so many steps; 0: only before the first and after the last."""
    grid_prompts: int = 8
    """Prompts of the samples that are written along the way."""
    max_new_tokens: int = 128
    """Methods on answers: most tokens of a sampled answer."""
    temperature: float = 0.0
    """Methods on answers: of sampled answers; 0 takes the most likely token."""
    reports: ReportsConfig | None = None
    """Methods on answers: also compare findings, errors and lengths with reference reports."""
    tasks: dict[str, str] | None = None
    """Methods on answers: held-out tasks that alignment must not harm, by name: tables of questions with right answers."""
    judge_options: dict[str, Any] = Field(default_factory=dict)
    """Methods on answers: settings of judges that are models, e.g. {green-api.retries: 8}."""


class ExperimentConfig(Section):
    """A whole experiment."""

    method: Annotated[Section, Variants(METHODS, "method")]
    model: Annotated[Section, Variants(MODELS, "model")]
    tuning: Annotated[Section, Variants(TUNINGS, "tuning")] = FullConfig()
    reference: Annotated[Section, Variants(REFERENCES, "reference")] | None = None
    """Default: adapter_off with lora (frozen_adapter where the reference moves during the run) and user, copy with full, none
    where the method needs none."""
    data: DataConfig
    optim: OptimConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    freezing: FreezingConfig | None = None
    """Train under a freeze mask (docs/freezing.md); default: nothing is frozen by a mask."""
    run: RunConfig

    @property
    def method_name(self) -> str:
        return str(self.method.model_dump()["name"])

    @property
    def model_name(self) -> str:
        return str(self.model.model_dump()["name"])

    @property
    def on_answers(self) -> bool:
        """Whether a vision-language model is trained."""
        return reads_language(self.model_name)

    @property
    def reference_name(self) -> str:
        """The reference strategy in force."""
        if self.reference is not None:
            return str(self.reference.model_dump()["name"])
        if not METHODS.get(self.method_name).wants_reference(self.method):
            return "none"
        if isinstance(self.tuning, FullConfig):
            return "copy"
        return "frozen_adapter" if METHODS.get(self.method_name).moving_reference else "adapter_off"

    @property
    def draws(self) -> int:
        """Stored draws of a pair; 0 without."""
        if self.data.draws is not None:
            return self.data.draws
        return STORED_DRAWS if self.reference_name == "precomputed" and not self.on_answers else 0

    @property
    def folder(self) -> Path:
        return Path(self.run.out) if self.run.out else Path("runs") / self.run.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A decoded experiment and where its values came from."""

    config: ExperimentConfig
    resolved: Resolved
    source: str


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment file.

    Args:
        path: a YAML file.
        overrides: ``key.sub=value`` texts; later wins.

    Raises:
        ConfigError: all problems of the file in one error.
    """
    resolved = load_yaml(path, list(overrides))
    config, problems = _placed(decode(ExperimentConfig, resolved, str(path)))
    problems += _contradictions(config)
    if problems:
        raise ConfigError(problems, str(path))
    return Experiment(config=config, resolved=resolved, source=str(path))


def _placed(config: ExperimentConfig) -> tuple[ExperimentConfig, list[str]]:
    """Embedded models and tables by where they lie, so that shipped experiments work from any folder."""
    found, problems = {}, []
    for section, key in (("model", "path"), ("data", "manifest")):
        values = getattr(config, section)
        try:
            place = str(assets.placed(getattr(values, key)))
        except ModelError as error:
            problems.append(f"{section}.{key}: {error}")
            continue
        if Path(place) != Path(getattr(values, key)):
            found[section] = values.model_copy(update={key: place})
    return config.model_copy(update=found), problems


def _contradictions(config: ExperimentConfig) -> list[str]:
    """Settings that are fine alone and wrong together."""
    problems = []
    needs = METHODS.get(config.method_name).wants_reference(config.method)
    reference, lora = config.reference_name, isinstance(config.tuning, LoraConfig)
    users, alone = METHODS.get(config.method_name).users(config.method), isinstance(config.tuning, UserTuningConfig)
    if reference in ("adapter_off", "frozen_adapter") and not (lora or (alone and reference == "adapter_off")):
        problems.append(f"reference.name: '{reference}' needs tuning.name=lora; use 'copy' with full fine-tuning")
    if alone and users is None:
        problems.append(f"tuning.name: 'user' trains what '{config.method_name}' has not: users; use full or lora")
    if users is not None and config.data.buckets:
        problems.append("data.buckets: batches of several shapes bring no users; remove it")
    if users is not None and config.data.mix and users.sampling != "pairs":
        problems.append("method.users.sampling: the tables of data.mix have shares of their own; use 'pairs'")
    if needs and reference == "none":
        problems.append(f"reference.name: '{config.method_name}' compares with a reference; use 'copy' or 'adapter_off'")
    if not needs and reference != "none":
        problems.append(f"reference.name: '{config.method_name}' uses no reference; remove it or set it to 'none'")
    problems += _kinds(config) + _masks(config) + _stages(config)
    problems += _stored_reference(config) if config.on_answers else _stored_draws(config)
    if (config.evaluate.rewards or config.evaluate.holdout) and config.evaluate.prompts is None:
        problems.append("evaluate.prompts: rewards are named, so prompts to score are needed")
    pairs = METHODS.get(config.method_name).batches == "pairs"
    capped, data = config.data.max_per_prompt, config.data
    for name in ("mix", "buckets", "max_per_prompt", "long_prompts"):
        if name in data.model_fields_set and getattr(data, name) not in ((), False, None, "cut") and not pairs:
            problems.append(f"data.{name}: '{config.method_name}' does not train on pairs of pictures; remove it")
    if config.data.weights and len(config.data.weights) != len(config.data.mix) + 1:
        problems.append(f"data.weights: {len(config.data.mix) + 1} tables need as many weights, first that of data.manifest")
    if config.data.decode == "processes" and (
        config.data.cache != "off" or config.data.mix or config.data.buckets or METHODS.get(config.method_name).batches != "pairs"
    ):
        problems.append(
            "data.decode: processes decode pairs of one table in one shape, and with caches nothing is decoded; use 'threads'"
        )
    if capped is not None and (capped < 1 or data.mix or data.buckets or (users is not None and users.sampling != "pairs")):
        problems.append("data.max_per_prompt: at least 1, and not with data.mix, data.buckets or shares of users")
    if config.data.buckets and (config.data.mix or config.draws or config.data.crop == "random"):
        problems.append("data.buckets: goes neither with data.mix, nor with stored draws, nor with random crops")
    # Of the shipped methods only these read a probability of one half as what it is; a method of the user's own may.
    reads = config.method.model_dump().get("soft_labels", config.method_name == "smpo")
    if config.data.ties == "soft" and config.method_name in METHODS.names() and not reads:
        problems.append(f"data.ties: '{config.method_name}' as configured reads no probabilities; use 'drop'")
    return problems


ANSWERS_EVALUATED = ("reports", "tasks", "judge_options")
PICTURES_ONLY = ("resolution", "flip", "crop", "drop_caption", "draws", "decode")
ANSWERS_ONLY = ("max_length", "max_answer", "stage", "cache_vision", "cache_frames", "video_decoder")


def _kinds(config: ExperimentConfig) -> list[str]:
    """A method on answers needs a model that answers, and settings of the other kind would have no effect."""
    method, answers = config.method_name, METHODS.get(config.method_name).batches.startswith("vlm_")
    if answers != config.on_answers:
        kinds = ("a vision-language model", "a model that makes pictures")
        return [f"model.name: '{method}' trains {kinds[not answers]}; '{config.model_name}' is {kinds[answers]}"]
    without = PICTURES_ONLY if answers else ANSWERS_ONLY
    given, defaults = config.data.model_dump(), {name: field.default for name, field in DataConfig.model_fields.items()}
    found = [f"data.{name}: has no effect with '{method}'; remove it" for name in without if given[name] != defaults[name]]
    if not answers:
        asked = config.evaluate.model_dump()
        found += [f"evaluate.{name}: has no effect with '{method}'; remove it" for name in ANSWERS_EVALUATED if asked[name]]
    return found


def _stored_reference(config: ExperimentConfig) -> list[str]:
    """What a precomputed reference of answers needs of the rest."""
    if config.reference_name != "precomputed":
        return []
    problems, objective = [], config.method.model_dump().get("objective")
    method = METHODS.get(config.method_name)
    if not method.stored_reference or objective == "ld_dpo" or method.wants_mismatched(config.method):
        problems.append(
            f"reference.name: '{objective or config.method_name}' asks its reference about answers that are not in the table, or "
            "token by token, so it cannot be precomputed; use 'adapter_off' with lora or 'copy' with full"
        )
    if config.data.cache == "off":
        problems.append("data.cache: 'reference: precomputed' is a cache; use auto or a folder")
    return problems


def _stages(config: ExperimentConfig) -> list[str]:
    """What a curriculum and the caches of clips need of the rest."""
    problems = []
    stored = [name for name in ("cache_vision", "cache_frames") if getattr(config.data, name)]
    if stored and config.data.cache == "off":
        problems.append(f"data.{stored[0]}: is a cache, and data.cache is off; use auto or a folder")
    if METHODS.get(config.method_name).batches != "vlm_stages":
        return problems
    steps = sum(stage["steps"] for stage in config.method.model_dump()["stages"])
    if config.optim.steps not in (0, steps):
        problems.append(f"optim.steps: the stages have {steps} steps in all, not {config.optim.steps}; set optim.steps={steps}")
    if config.data.stage is not None:
        problems.append(f"data.stage: the stages of '{config.method_name}' name their own rows (method.stages); remove it")
    return problems


def _masks(config: ExperimentConfig) -> list[str]:
    """What mask learning has no use for."""
    if METHODS.get(config.method_name).batches != "domains":
        return []
    problems = []
    if config.freezing is not None:
        problems.append(f"freezing: '{config.method_name}' makes a mask and trains under none; remove the section")
    if config.evaluate.prompts is not None or config.evaluate.every:
        problems.append(f"evaluate: '{config.method_name}' makes a mask, to be compared by evaluate-guard; remove the section")
    if config.optim.ema_decay:
        problems.append(f"optim.ema_decay: '{config.method_name}' keeps no trained weights that could be averaged; leave it at 0")
    return problems


def _stored_draws(config: ExperimentConfig) -> list[str]:
    """What stored draws and a precomputed reference need of the rest."""
    problems, method = [], METHODS.get(config.method_name)
    if config.draws < 0:
        problems.append(f"data.draws: must be at least 0, got {config.draws}")
    if config.draws and method.batches != "pairs":
        problems.append(f"data.draws: '{config.method_name}' reads no pairs of pictures; stored draws are for those")
    if config.reference_name != "precomputed":
        return problems
    if not method.stored_reference:
        problems.append(
            f"reference.name: '{config.method_name}' asks its reference at every step, so it cannot be precomputed; use "
            f"'adapter_off' with lora or 'copy' with full"
        )
    if config.draws == 0:
        problems.append("data.draws: 'reference: precomputed' stores the scores of stored draws; set at least 1")
    if config.data.cache == "off":
        problems.append("data.cache: 'reference: precomputed' is a cache; use auto or a folder")
    return problems


def explain(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The values in force and the file each came from."""
    experiment = load_experiment(path, overrides)
    return explain_yaml(experiment.config, experiment.resolved)


def schema() -> dict[str, Any]:
    """The JSON Schema of experiment files."""
    return json_schema(ExperimentConfig)

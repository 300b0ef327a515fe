"""One config per workflow, made of its stages' configs."""

from dataclasses import dataclass, field, replace

from d2f_core.correspondence.embed.config import EmbedConfig
from d2f_core.correspondence.evaluate.config import EvaluateMatchesConfig
from d2f_core.correspondence.publish.config import RegisterMatcherConfig
from d2f_core.correspondence.views.config import MakeViewsConfig
from d2f_core.data.datasets.config import MakeDatasetConfig, MakeDepthConfig
from d2f_core.flow.depth.config import EvaluateDepthConfig, PredictDepthConfig
from d2f_core.flow.encode.config import EncodeConfig, EncodeDepthConfig
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.model.config import PredictionName
from d2f_core.storage import join
from pipelines.configs import FinetuneConfig, TrainAutoencoderConfig
from pipelines.distill_config import DistillConfig
from pipelines.names import CAPTIONS
from pipelines.unpack_config import UnpackConfig


@dataclass(frozen=True, kw_only=True)
class WorkflowConfig:
    """From images to a trained model and its comparison with the base.

    Stages read each other's outputs: leave a field that names such an output empty, or give it the same URI.
    """

    output: str
    """Where stage records, prompts, generations, contact sheet and summary.json are written."""
    dataset: MakeDatasetConfig
    encode: EncodeConfig
    """`source.uri` is the dataset's output, `base` that of `finetune`."""
    finetune: FinetuneConfig
    """`latents` is the encode's output."""
    register: RegisterConfig = field(default_factory=RegisterConfig)
    """`run`, `model` and `experiment` are the finetune's."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Run twice, for base and flow model; `prompts`, `model` and `output` are filled in."""
    sheet: ContactSheetConfig = field(default_factory=ContactSheetConfig)
    """`generations`, `output`, `run` and `experiment` are filled in."""
    prompts: tuple[str, ...] = ()
    """Prompts for both models."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty. Give s3://bucket/key or a local path.")
        if not self.prompts:
            raise ValueError("prompts is empty. Give at least one, so that the models can be compared.")
        require_same("encode.source.uri", self.encode.source.uri, "dataset.output", self.dataset.output)
        require_same("encode.base", self.encode.base, "finetune.model.base", self.finetune.model.base)
        require_same("finetune.latents", self.finetune.latents, "encode.output", self.encode.output)
        require_same("register.run", self.register.run, "finetune.output", self.finetune.output)

    @property
    def prompts_uri(self) -> str:
        return join(self.output, "prompts.jsonl")

    @property
    def captions_uri(self) -> str:
        """Every caption of the dataset as a prompt, for `pipelines.evaluate`."""
        return join(self.output, CAPTIONS)

    def wired_encode(self) -> EncodeConfig:
        source = replace(self.encode.source, uri=self.dataset.output)
        return replace(self.encode, source=source, base=self.finetune.model.base)

    def wired_finetune(self) -> FinetuneConfig:
        return replace(self.finetune, latents=self.encode.output)

    def wired_generate(self, model: str, output: str) -> GenerateConfig:
        # By default, the base would use its own size, the flow model the size of its training images.
        edge = self.generate.resolution or self.encode.resolution
        given = {"prompts": self.prompts_uri, "model": model, "output": output, "resolution": edge}
        return replace(self.generate, **given, base_prediction=self.prediction_of(model))

    def prediction_of(self, model: str) -> PredictionName:
        """What was said of the base, if the model is the base itself; a trained model says it itself."""
        return self.finetune.model.base_prediction if model == self.finetune.model.base else ""

    def wired_sheet(self, *generations: str) -> ContactSheetConfig:
        return replace(
            self.sheet,
            generations=generations,
            output=join(self.output, "contact_sheet.png"),
            run=self.finetune.output,
            experiment=self.finetune.experiment,
        )


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """From rendered scenes to a measured depth model.

    Stages read each other's outputs: leave a field that names such an output empty, or give it the same URI.
    """

    output: str
    """Where stage records, predictions, the evaluation and summary.json are written."""
    dataset: MakeDepthConfig
    """Scenes for training."""
    test: MakeDepthConfig
    """Scenes for the evaluation."""
    decoder: TrainAutoencoderConfig | None = None
    """First stage: trains a base's decoder on the dataset; `finetune.model.base` is its result. None: no such stage,
    for a base that already decodes depth well."""
    encode: EncodeDepthConfig
    """`source.uri` is the dataset's output, `base` that of `finetune`."""
    finetune: FinetuneConfig
    """`latents` is the encode's output."""
    register: RegisterConfig = field(default_factory=RegisterConfig)
    """`run`, `model` and `experiment` are the finetune's."""
    predict: PredictDepthConfig = field(default_factory=PredictDepthConfig)
    """`source.uri` is the test scenes; `model` and `output` are filled in."""
    evaluate: EvaluateDepthConfig = field(default_factory=EvaluateDepthConfig)
    """`predictions`, `truth`, `train` and `output` are filled in."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty. Give s3://bucket/key or a local path.")
        if self.decoder:
            made = join(self.decoder.output, "base")
            require_same("decoder.images", self.decoder.images, "dataset.output", self.dataset.output)
            require_same("finetune.model.base", self.finetune.model.base, "decoder.output/base", made)
        require_same("encode.source.uri", self.encode.source.uri, "dataset.output", self.dataset.output)
        require_same("encode.base", self.encode.base, "finetune.model.base", self.finetune.model.base)
        require_same("finetune.latents", self.finetune.latents, "encode.output", self.encode.output)
        require_same("register.run", self.register.run, "finetune.output", self.finetune.output)
        require_same("predict.source.uri", self.predict.source.uri, "test.output", self.test.output)


@dataclass(frozen=True, kw_only=True)
class ReflowConfig:
    """Rounds in which a model is trained on pairs that the previous model generated."""

    output: str
    """Where stage records, prompts, pairs and trainings are written."""
    teacher: str
    """Model that generates the first pairs: a base model, or a trained one (directory or models:/NAME@ALIAS)."""
    captions: str
    """Latent table whose captions are the prompts, in order, repeated as often as needed."""
    num_pairs: int = 10_000
    """Number of pairs per round."""
    rounds: int = 1
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How pairs are generated; `prompts`, `model`, `output` and `emit` are filled in. `guidance` and `solver` apply to
    the first teacher only: later ones use their own defaults, as their pairs already include guidance."""
    finetune: FinetuneConfig
    """Training of each round; `latents`, `output` and `model.start` are filled in."""
    register: RegisterConfig = field(default_factory=RegisterConfig)
    """`run`, `model` and `experiment` are the finetune's."""
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(promote=False))
    """Evaluation of each round's version; `candidate`, `champion` (the teacher, unless it is the base) and `output` are
    filled in. Without `prompts` there is no evaluation."""

    def __post_init__(self) -> None:
        for name in ("output", "teacher", "captions"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty. Give --{name} URI.")
        if self.num_pairs < 1 or self.rounds < 1:
            raise ValueError(f"num_pairs={self.num_pairs} and rounds={self.rounds} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class DistillWorkflowConfig:
    """From rendered views to a distilled, refined and measured student."""

    output: str
    """Where stage records and summary.json are written."""
    views: MakeViewsConfig
    base: UnpackConfig
    embed: EmbedConfig
    distill: DistillConfig
    refine: DistillConfig
    """`start` is the distilled student."""
    control: DistillConfig
    """As many steps as `refine`, of distillation alone; `start` is the distilled student."""
    register: RegisterMatcherConfig = field(default_factory=RegisterMatcherConfig)
    """`run`, `model` and `experiment` are those of `refine`."""
    evaluate: EvaluateMatchesConfig
    """The matcher that its gate judges is the registered version."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty. Give s3://bucket/key or a local path.")
        for name in ("distill", "refine", "control"):
            require_same(f"{name}.features", getattr(self, name).features, "embed.output", self.embed.output)
        require_same("embed.source.uri", self.embed.source.uri, "views.output", self.views.output)
        require_same("distill.matcher.student.base", self.distill.matcher.student.base, "base.output", self.base.output)
        made = {self.base.output, *(join(each.output, "model") for each in (self.distill, self.refine, self.control))}
        for each in self.evaluate.matchers:
            if each.uri and each != self.evaluate.judged and each.uri not in made:
                raise ValueError(
                    f"evaluate compares {each.name!r} at {each.uri!r}, which the workflow does not make: it makes "
                    f"{', '.join(sorted(made))}. Give one of these."
                )

    def wired_evaluate(self, version: str) -> EvaluateMatchesConfig:
        """The evaluation, with a registered version as what the gate judges."""
        judged = self.evaluate.judged
        matchers = [replace(each, uri=version) if each == judged else each for each in self.evaluate.matchers]
        gate = replace(self.evaluate.gate, candidate=judged.name if judged else "")
        return replace(self.evaluate, matchers=tuple(matchers), gate=gate)


def require_same(name: str, value: str, other: str, expected: str) -> None:
    """Raise ValueError if a field names another URI than the one that the earlier stage writes to."""
    if value not in ("", expected):
        raise ValueError(f"{name}={value!r} is not {other}={expected!r}, which the workflow makes. Give both the same.")

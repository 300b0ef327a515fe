"""The whole way from images to a compared model, as one config: the stages' own configs, wired together."""

from dataclasses import dataclass, field, replace

from d2f_core.data.emoji import MakeDatasetConfig
from d2f_core.inference.contact_sheet import ContactSheetConfig
from d2f_core.inference.encode import EncodeConfig
from d2f_core.inference.generate import GenerateConfig
from d2f_core.inference.register import RegisterConfig
from d2f_core.storage import join
from pipelines.configs import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class WorkflowConfig:
    """Stages read each other's outputs: leave a field that names one empty, or give it the same URI."""

    output: str
    """Stage records, prompts, generations, contact sheet and summary.json go here."""
    dataset: MakeDatasetConfig
    encode: EncodeConfig
    """`source.uri` is the dataset's output, `base` the finetune's."""
    finetune: FinetuneConfig
    """`latents` is the encode's output."""
    register: RegisterConfig = field(default_factory=RegisterConfig)
    """`run`, `model` and `experiment` are the finetune's."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Run twice, for base and flow model; `prompts`, `model` and `output` are filled in."""
    sheet: ContactSheetConfig = field(default_factory=ContactSheetConfig)
    """`generations`, `output`, `run` and `experiment` are filled in."""
    prompts: tuple[str, ...] = ()
    """What both models are asked to draw."""

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
        return join(self.output, "captions.jsonl")

    def wired_encode(self) -> EncodeConfig:
        source = replace(self.encode.source, uri=self.dataset.output)
        return replace(self.encode, source=source, base=self.finetune.model.base)

    def wired_finetune(self) -> FinetuneConfig:
        return replace(self.finetune, latents=self.encode.output)

    def wired_generate(self, model: str, output: str) -> GenerateConfig:
        # The base would draw at its own size, the flow model at that of the images it was trained on.
        edge = self.generate.resolution or self.encode.resolution
        return replace(self.generate, prompts=self.prompts_uri, model=model, output=output, resolution=edge)

    def wired_sheet(self, *generations: str) -> ContactSheetConfig:
        return replace(
            self.sheet,
            generations=generations,
            output=join(self.output, "contact_sheet.png"),
            run=self.finetune.output,
            experiment=self.finetune.experiment,
        )


def require_same(name: str, value: str, other: str, expected: str) -> None:
    """Refuse a field that names another place than the stage before it writes to. Raises ValueError."""
    if value not in ("", expected):
        raise ValueError(f"{name}={value!r} is not {other}={expected!r}, which the workflow makes. Give both the same.")

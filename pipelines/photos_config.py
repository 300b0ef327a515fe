"""The workflow from your own photos to a registered, measured flow model: one config, made of its stages' configs."""

from dataclasses import dataclass, field, replace

from d2f_core.data.sources.config import ImageSource, lies_in
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.flow.evaluate.config import AUTO, EvaluateConfig
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig
from d2f_core.import_images.config import ImportImagesConfig
from d2f_core.model.caption_rules import DEFAULT
from d2f_core.model.config import PredictionName
from d2f_core.model.hub import is_hub_id
from d2f_core.model.importing.config import ImportCheckpointConfig
from d2f_core.registration import check_name
from d2f_core.storage import join
from pipelines.configs import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class PhotosConfig:
    """From captioned photos and a checkpoint to a flow model that is compared with the checkpoint on held-out photos.

    The first fields say what is done; those of the stages say how. What the first fields and earlier stages determine
    is filled in, and must be left empty there: places, names, the base, the resolution.
    """

    name: str = ""
    """Of the registered model, the MLflow run and, below `place`, the directory of all outputs."""
    base: str = ""
    """Base model: a directory in diffusers' layout, an s3:// prefix, a hub id, or one .safetensors file."""
    source: ImageSource = field(default_factory=ImageSource)
    """Captioned photos."""
    resolution: int = 512
    """Height and width in pixels that the photos are cropped to, and the model is trained and sampled at."""
    place: str = "s3://d2f/photos"
    """Where the workflow's directory lies: PLACE/NAME."""
    base_prediction: PredictionName = ""
    """What the base predicts, if its scheduler config says it wrongly."""
    prompts: tuple[str, ...] = ()
    """What previews and the contact sheet are drawn from; empty: `shown` captions of held-out photos."""
    shown: int = 6
    """How many captions those are; where fewer photos are held out, others follow."""
    evaluated: bool = True
    """Compare model and base on the held-out photos. False: for less photos than that needs."""
    checkpoint: ImportCheckpointConfig = field(default_factory=ImportCheckpointConfig)
    """Another autoencoder, and LoRAs that are merged into the base."""
    images: ImportImagesConfig = field(default_factory=ImportImagesConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    finetune: FinetuneConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    sheet: ContactSheetConfig = field(default_factory=ContactSheetConfig)

    def check_complete(self) -> None:
        """Raise ValueError when something is missing, or a stage's field contradicts what is filled in."""
        flags = {"name": "NAME", "base": "URI"}
        for name, kind in flags.items():
            if not getattr(self, name):
                raise ValueError(f"{name} is empty. Give --{name} {kind}.")
        if not self.source.uri:
            raise ValueError("source.uri is empty. Give --source.uri URI: a folder, tars or parquet of photos.")
        check_name(self.name)
        if lies_in(self.output, self.source.uri):
            raise ValueError(
                f"place={self.place!r} puts the outputs, {self.output!r}, inside the source {self.source.uri!r}. Give "
                "--place URI: a directory beside it."
            )
        if self.shown < 1:
            raise ValueError(f"shown={self.shown} must be at least 1.")
        if self.encode.buckets or self.encode.crop != "center":
            raise ValueError(
                f"encode.buckets={self.encode.buckets!r} and encode.crop={self.encode.crop!r}: this workflow imports "
                "squares, of which nothing is left to cut. For another part of each photo give --images.crop; for its "
                "aspect run import_images, encode_latents and finetune one by one (docs/images.md)."
            )
        for name, (value, nothing) in self._filled_in().items():
            if value != nothing:
                raise ValueError(f"{name}={value!r} is filled in by this workflow. Leave it out; see --help.")

    def _filled_in(self) -> dict[str, tuple[object, object]]:
        """The stages' fields that this workflow fills in: their value, and the one that says nothing, by name."""
        says_nothing: dict[str, tuple[object, dict[str, object]]] = {
            "checkpoint": (self.checkpoint, {"source": "", "output": "", "prediction": ""}),
            "images": (
                self.images, {"source": ImageSource(), "output": "", "resolution": 0, "base": "", "captions": DEFAULT}
            ),
            "encode": (self.encode, {"source": ImageSource(), "output": "", "resolution": 64, "base": ""}),
            "finetune": (self.finetune, {"latents": "", "output": "", "name": ""}),
            "finetune.model": (self.finetune.model, {"base": "", "base_prediction": "", "captions": DEFAULT}),
            "finetune.preview": (self.finetune.preview, {"prompts": ()}),
            "generate": (
                self.generate, {"prompts": "", "model": "", "output": "", "resolution": None, "base_prediction": ""}
            ),
            "evaluate": (
                self.evaluate,
                {"candidate": "", "base": "", "reference": "", "output": "", "resolution": None, "base_prediction": ""},
            ),
            "sheet": (self.sheet, {"generations": (), "output": "", "run": "", "experiment": "diff2flow"}),
        }  # fmt: skip
        return {
            f"{stage}.{name}": (getattr(config, name), nothing)
            for stage, (config, fields) in says_nothing.items()
            for name, nothing in fields.items()
        }

    @property
    def output(self) -> str:
        """Where all that the workflow makes is written."""
        return join(self.place, self.name)

    def images_of(self, side: str) -> str:
        """URI of the image table of `train` or `test`."""
        return join(self.output, "images", side)

    @property
    def imports_checkpoint(self) -> bool:
        """Whether the base is made first: of one file, of a hub's model, or with something put in."""
        base, given = self.base, self.checkpoint
        is_elsewhere = base.endswith(".safetensors") or is_hub_id(base)
        return is_elsewhere or bool(given.vae or given.lora) or given.zero_snr is not None

    def wired_checkpoint(self) -> ImportCheckpointConfig:
        given = {"source": self.base, "output": join(self.output, "base"), "prediction": self.base_prediction}
        return replace(self.checkpoint, **given)

    def wired_images(self) -> ImportImagesConfig:
        # The captions' tokens are counted as the base's encoder reads them.
        fewest = self.evaluate.fewest_images if self.evaluated else 0
        return replace(
            self.images,
            held_out_least=max(self.images.held_out_least, fewest),
            source=self.source,
            output=join(self.output, "images"),
            resolution=self.resolution,
            base=self.base,
            captions=self.encode.captions,
        )

    def wired_encode(self) -> EncodeConfig:
        return replace(
            self.encode,
            source=ImageSource(uri=self.images_of("train")),
            base=self.base,
            output=join(self.output, "latents"),
            resolution=self.resolution,
        )

    def wired_finetune(self) -> FinetuneConfig:
        given = {"base": self.base, "base_prediction": self.base_prediction, "captions": self.encode.captions}
        return replace(
            self.finetune,
            model=replace(self.finetune.model, **given),
            latents=join(self.output, "latents"),
            output=join(self.output, "run"),
            preview=replace(self.finetune.preview, prompts=self.prompts),
            name=self.name,
        )

    def wired_generate(self, model: str, output: str) -> GenerateConfig:
        given = {"prompts": self.prompts_uri, "model": model, "output": output, "resolution": self.resolution}
        return replace(self.generate, **given, base_prediction=self.prediction_of(model))

    def prediction_of(self, model: str) -> PredictionName:
        """What was said of the base, if the model is the base itself; a trained model says it itself."""
        return self.base_prediction if model == self.base else ""

    def wired_evaluate(self, candidate: str) -> EvaluateConfig:
        return replace(
            self.evaluate,
            candidate=candidate,
            base=self.base,
            base_prediction=self.base_prediction,
            reference=self.images_of("test"),
            training=self.images_of("train") if self.evaluate.training == AUTO else self.evaluate.training,
            output=join(self.output, "evaluation"),
            resolution=self.resolution,
        )

    def wired_sheet(self, *generations: str) -> ContactSheetConfig:
        return replace(
            self.sheet,
            generations=generations,
            title=self.sheet.title if self.sheet.title != ContactSheetConfig().title else self.name,
            output=join(self.output, "contact_sheet.png"),
            run=join(self.output, "run"),
            experiment=self.finetune.experiment,
        )

    @property
    def prompts_uri(self) -> str:
        return join(self.output, "prompts.jsonl")

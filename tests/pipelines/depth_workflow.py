"""The smallest whole depth workflow."""

from d2f_core.data.datasets.config import MakeDepthConfig
from d2f_core.flow.depth.config import EvaluateDepthConfig, PredictDepthConfig
from d2f_core.flow.encode.config import EncodeDepthConfig
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.model.config import LoraConfig, ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.train.config import TrainConfig
from pipelines.configs import FinetuneConfig, TrainAutoencoderConfig
from pipelines.workflow_config import DepthConfig

HOME = "s3://d2f/test-depth-workflow"
TRAIN = TrainConfig(
    num_steps=2, global_batch_size=4, micro_batch_size=4, threads_per_worker=1, zero_stage=0,
    learning_rate=1e-2, log_every=1, checkpoint_every=2, evaluate_every=2,
)  # fmt: skip


def depth_config(base: str, home: str = HOME) -> DepthConfig:
    made = f"{home}/decoder/base"
    return DepthConfig(
        output=f"{home}/workflow",
        dataset=MakeDepthConfig(output=f"{home}/scenes", size=16, num_scenes=12, num_tasks=1),
        test=MakeDepthConfig(output=f"{home}/test", split="test", size=16, num_scenes=3, num_tasks=1),
        decoder=TrainAutoencoderConfig(base=base, images="", output=f"{home}/decoder", holdout_rows=4, train=TRAIN),
        encode=EncodeDepthConfig(resolution=16, output=f"{home}/latents", num_actors=1),
        finetune=FinetuneConfig(
            model=ModelConfig(base=made, task="image_to_depth", lora=LoraConfig(preset="small")),
            latents="",
            output=f"{home}/run",
            holdout_rows=4,
            preview=PreviewConfig(rows=2, steps=1, columns=1),
            sampling=SamplingDefaults(steps=2, guidance=1.0),
            train=TRAIN,
            experiment="depth workflow tests",
        ),
        register=RegisterConfig(name=home.rpartition("/")[2].removeprefix("test-")),
        predict=PredictDepthConfig(steps=(1, 2), ensemble=1, num_actors=1, experiment=""),
        evaluate=EvaluateDepthConfig(replicates=20, shown=1, experiment=""),
    )

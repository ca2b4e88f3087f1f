"""Configs of pipelines, and the running of one stage."""

from configs import quickstart
from jaxllm.config import override, parse
from jaxllm.pipeline import run as pipeline
from jaxllm.pipeline.config import PipelineConfig


def make_config(**changes):
    config = quickstart.get_config()
    for field, text in changes.items():
        override(config, PipelineConfig, field.replace("__", "."), text)
    return parse(PipelineConfig, config)


def run_stage(command, folder, report=lambda: None, spend=lambda *_: None, **before):
    return pipeline.run_stage(command, folder / "logs" / "x.txt", report, spend, **before)

"""A run says when what it asked to attend through is another one here."""

import dataclasses

import pytest

from moerec.train.loop import _tell_of_attention
from tests.tiny import make_config


@pytest.mark.parametrize(
    ("attention", "platform", "told"),
    [
        ("splash", "cpu", "tiny  model.attention=splash is for TPUs; on this CPU it is as auto\n"),
        ("cudnn", "tpu", "tiny  model.attention=cudnn is for GPUs; on this TPU it is as auto\n"),
        ("splash", "tpu", ""),
        ("cudnn", "gpu", ""),
        ("auto", "cpu", ""),
        ("xla_blocks", "gpu", ""),
    ],
)
def test_another_platform_is_told(attention, platform, told, capsys):
    config = make_config()
    fields = {"attention": attention, "compute_dtype": "bfloat16"}
    _tell_of_attention(dataclasses.replace(config, model=dataclasses.replace(config.model, **fields)), platform)
    assert capsys.readouterr().err == told

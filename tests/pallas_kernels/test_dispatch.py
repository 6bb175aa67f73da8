"""Which implementation runs: who falls back where a kernel refuses, and what the log says."""

import logging

import pytest

from pallas_kernels import dispatch


def refuse():
    raise NotImplementedError("too wide")


def table(**kernels):
    return {"xla": lambda: "plain", **kernels}


def test_pallas_takes_the_kernel_where_it_can():
    assert dispatch.call("taken", table(pallas_tpu=lambda: "kernel"), "pallas") == "kernel"  # a CPU interprets the TPU's
    assert dispatch.call("taken", table(pallas_tpu=lambda: "kernel"), "auto") == "plain"


def test_pallas_falls_back_and_the_log_says_why(caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert dispatch.call("refused", table(pallas_tpu=refuse), "pallas") == "plain"
    assert caplog.messages == ["refused: xla (pallas_tpu: too wide)"]


def test_a_kernel_by_its_name_never_falls_back():
    with pytest.raises(NotImplementedError, match="^too wide$"):
        dispatch.call("named", table(pallas_tpu=refuse), "pallas_tpu")
    with pytest.raises(ValueError, match="no implementation 'pallas_gpu'; it has xla, pallas_tpu"):
        dispatch.call("named", table(pallas_tpu=refuse), "pallas_gpu")


def test_an_op_without_kernels_is_plain():
    assert dispatch.call("plain", table(), "pallas_gpu") == "plain"


def test_a_case_that_all_refuse_names_every_reason():
    with pytest.raises(NotImplementedError, match="pallas_tpu: too wide; xla: too wide"):
        dispatch.call("hopeless", {"xla": refuse, "pallas_tpu": refuse}, "pallas")

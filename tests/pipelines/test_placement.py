"""The GPU graph, built without a GPU: every operator is on a device that DALI supports for it."""

from __future__ import annotations

from typing import Any

import pytest
from nvidia.dali.ops import _registry

from fast_spatial.pipelines.graph import view_graph
from fast_spatial.pipelines.inspection.decoding import image_graph
from fast_spatial.pipelines.placement import RUNGS, WARPS, Decoding, Placement, usual_placement

GPU = "gpu"
# The schema's name and the name under which DALI's plugin lists it.
LISTED_AS = {"NumbaFuncImpl": "NumbaFunction"}
USUAL = usual_placement(on_gpu=True)
PLACEMENTS = [Placement(rung, warp) for rung in RUNGS for warp in WARPS if warp != "numba" or rung.on == "cpu"]
every_placement = pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: f"{p.decoding}, {p.warp}")


def no_source(_info: Any) -> Any:
    raise AssertionError("the graph is never run")


def built(*, center: bool, on_gpu: bool = True, placement: Placement = USUAL) -> Any:
    """The pipeline, with its graph and its backend checked as far as DALI does before it needs the GPU.

    Our own operators cannot be serialized, which is the last thing that DALI finds out.
    """
    pipeline = view_graph(
        no_source,
        views=3,
        center=center,
        placement=placement,
        on_gpu=on_gpu,
        batch_size=2,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pytest.raises(RuntimeError, match=r"Could not serialize the operator: .*NumbaFunction"):
        pipeline.serialize()
    return pipeline


def operators(pipeline: Any) -> list[tuple[str, str]]:
    """(schema's name, device) of each operator of a built pipeline."""
    return [(node._op.schema.Name(), node._op.device) for node in pipeline._ops]


@every_placement
@pytest.mark.parametrize("center", [True, False])
def test_every_operator_exists_for_its_device(center, placement):
    registered = {"cpu": _registry.cpu_ops(), "gpu": _registry.gpu_ops(), "mixed": _registry.mixed_ops()}
    found = operators(built(center=center, placement=placement))
    assert len(found) > 5
    for name, device in found:
        assert LISTED_AS.get(name, name) in registered[device], f"{name} does not exist for {device}"


def test_a_check_decodes_with_the_operator_of_training_on_cpus():
    pipeline = image_graph(batch_size=2, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False)
    pipeline.serialize()
    on_cpus = Placement(Decoding("cpu"), "numba")
    checked, trained = (
        next(node._op for node in graph._ops if node._op.schema.Name() == "decoders__ImageSlice")
        for graph in (pipeline, built(center=True, on_gpu=False, placement=on_cpus))
    )
    assert checked.device == trained.device == "cpu"
    assert checked._init_args == trained._init_args


@pytest.mark.parametrize("center", [True, False])
def test_pixels_stay_on_the_gpu_and_decisions_on_the_cpu(center):
    devices: dict[str, set[str]] = {}
    for name, device in operators(built(center=center)):
        devices.setdefault(name, set()).add(device)
    assert devices["decoders__ImageSlice"] == {"mixed"}
    on_gpu = {name for name, where in devices.items() if where == {GPU}}
    expected = {"Resize", "CoordTransform", "ExpandDims", "SequenceRearrange", "WarpAffine", "reductions__Mean"}
    assert on_gpu == expected | ({"Slice"} if center else set())
    assert devices["Cast"] == {GPU, "cpu"}
    for name in ("ExternalSource", "io__file__Read", "PeekImageShape", "NumbaFuncImpl", "PerFrame", "Cat"):
        assert devices[name] == {"cpu"}, name


@every_placement
@pytest.mark.parametrize("center", [True, False])
def test_inputs_are_where_their_operators_need_them(center, placement):
    """Images of GPU operators are on the GPU. Arguments, and all inputs of CPU and mixed operators, are on the CPU."""
    for node in built(center=center, placement=placement)._ops:
        spec, device = node.spec, node._op.device
        for i in range(spec.NumInput()):
            expected = GPU if device == GPU and i < spec.NumRegularInput() else "cpu"
            assert spec.InputDevice(i) == expected, f"input {i} of {node.name}"


@every_placement
def test_outputs_are_on_the_gpu_and_headers_in_host_memory(placement):
    *outputs, header = built(center=True, placement=placement)._graph_outputs
    assert [output.device for output in outputs] == [GPU] * (3 if placement.warp == "triton" else 1)
    assert header.device == "cpu"


@every_placement
def test_decoding_is_where_it_was_asked_for(placement):
    found = {name: device for name, device in operators(built(center=False, placement=placement)) if "decoders" in name}
    whole, on_cpu = placement.decoding.on == "gpu-full", placement.decoding.on == "cpu"
    assert found == {"decoders__Image" if whole else "decoders__ImageSlice": "cpu" if on_cpu else "mixed"}


@every_placement
def test_nothing_comes_back_from_the_gpu(placement):
    """A CPU operator that waits for the GPU would block prefetching."""
    nodes = built(center=True, placement=placement)._ops
    back = [i.name for node in nodes for i in node.inputs if i.device == "cpu" and i.source._op.device != "cpu"]
    assert back == []


@pytest.mark.parametrize("warp", WARPS)
def test_the_graph_for_a_cpu_is_all_on_the_cpu(warp):
    placement = Placement(Decoding("cpu"), warp)
    assert {device for _, device in operators(built(center=True, on_gpu=False, placement=placement))} == {"cpu"}


@pytest.mark.parametrize("on", ["gpu", "gpu-full"])
def test_numba_makes_no_views_of_images_in_gpu_memory(on):
    with pytest.raises(ValueError, match="host memory"):
        Placement(Decoding(on), "numba")

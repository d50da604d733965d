"""Writing a model's weights in shards."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from qlora.errors import InputError
from qlora.model.weights import INDEX, SINGLE, Weights, write_weights

SIZES = {str(number): 1200 for number in range(7)}  # bytes of 300 float32 numbers


def tensors():
    for number in range(7):
        yield str(number), torch.full((300,), float(number))


def test_shards_are_filled_in_order_and_listed_in_the_index(tmp_path):
    write_weights(tmp_path, tensors(), SIZES, torch.float32, shard_bytes=4000)
    files = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [sorted(load_file(tmp_path / file)) for file in files] == [list("012"), list("345"), ["6"]]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 1200
    assert [index["weight_map"][name] for name in SIZES] == [files[0]] * 3 + [files[1]] * 3 + [files[2]]
    weights = Weights(tmp_path)
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors())
    assert weights.count_parameters() == 2100


def test_weights_that_fit_one_file_are_written_to_one(tmp_path):
    write_weights(tmp_path, tensors(), dict.fromkeys(SIZES, 600), torch.float16, shard_bytes=4200)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert {tensor.dtype for tensor in load_file(tmp_path / SINGLE).values()} == {torch.float16}


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    write_weights(tmp_path, tensors(), SIZES, torch.float32, shard_bytes=1000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 7


def test_only_one_shard_is_in_memory_at_a_time(tmp_path):
    alive, most_alive = weakref.WeakSet(), 0

    def counted_tensors():
        nonlocal most_alive
        for name, tensor in tensors():
            alive.add(tensor)
            most_alive = max(most_alive, len(alive))
            yield name, tensor

    write_weights(tmp_path, counted_tensors(), SIZES, torch.float32, shard_bytes=4000)
    assert 3 <= most_alive <= 4  # the generators hold one more while the next is made


def test_a_corrupt_index_is_named(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": [')
    with pytest.raises(InputError, match=f"{INDEX} is corrupt"):
        Weights(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(InputError, match=f"neither a {SINGLE} nor"):
        Weights(tmp_path)

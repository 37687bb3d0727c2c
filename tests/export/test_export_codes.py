import zipfile

import numpy as np
import pytest
import torch
from quant_kit import LowBitNet, trained
from score_kit import spotter

from kestrel.export.codes import code_arrays, write_npz, write_packed
from kestrel.models.inventory import other_parameters, weight_codes
from kestrel.models.quant_net import LowBitPlan
from kestrel.quant.packing import SCALE_BYTES, WeightCodes, unpack, unpack_kept, unpack_storage


def test_npz_bytes_depend_on_names_and_values_alone(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.int8).reshape(2, 3), "a": np.array(3), "names": np.array(["yes", "no"])}
    write_npz(tmp_path / "one.npz", arrays)
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    write_npz(tmp_path / "two.npz", arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    back = np.load(tmp_path / "one.npz", allow_pickle=False)
    assert list(back) == ["b", "a", "names"]
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert (back[name] == array).all()


def test_npz_takes_transposed_arrays(tmp_path):
    array = np.arange(6).reshape(2, 3).T
    write_npz(tmp_path / "a.npz", {"a": array})
    assert (np.load(tmp_path / "a.npz")["a"] == array).all()


@pytest.mark.parametrize("quant_w", [None, 4, 12])
def test_packed_weights_can_be_read_back_from_the_sections_alone(tmp_path, quant_w):
    net = spotter(quant_w).net
    codes = weight_codes(net, 6)
    trained = {group.name: group.tensor.numpy() for group in net.weight_groups()}
    places = write_packed(tmp_path / "weights.bin", codes, trained)
    data, end = (tmp_path / "weights.bin").read_bytes(), 0
    for place in places:
        assert place.offset == end
        end = place.offset + place.code_bytes + place.scale_bytes
        packed = data[place.offset : place.offset + place.code_bytes]
        numbers = unpack(packed, place.bits, int(np.prod(place.shape))).reshape(place.shape)
        scale = np.frombuffer(data, "<f4", place.scale_bytes // SCALE_BYTES, place.offset + place.code_bytes)
        decoded = WeightCodes(numbers, scale, place.bits).decode()
        assert np.abs(decoded - trained[place.name]).max() == place.largest_error
        largest = np.abs(trained[place.name]).max()
        assert place.largest_error <= (largest / 62 if quant_w is None else 1e-6)
    assert end == len(data) == sum(group.stored_bytes for group in codes.values())


@pytest.mark.parametrize("grid", ["8bit", "4bitsym", "ternary"])
def test_pruned_weights_take_the_bytes_of_those_that_are_kept(tmp_path, grid):
    sizes, counts = {}, {}
    for share in (0.0, 0.6):
        torch.manual_seed(4)
        net = trained(LowBitNet(LowBitPlan(grid, prune=share, prune_not=("first",))))
        codes = weight_codes(net, 8)
        given = {group.name: group.tensor.numpy() for group in net.weight_groups()}
        places = write_packed(tmp_path / "weights.bin", codes, given)
        data = (tmp_path / "weights.bin").read_bytes()
        sizes[share] = len(data)
        assert len(data) == sum(group.stored_bytes for group in codes.values())
        for place in places:
            packed, count = data[place.offset : place.offset + place.code_bytes], int(np.prod(place.shape))
            read = unpack_kept if place.zeros_left_out else unpack_storage
            assert (read(packed, place.storage, count) == codes[place.name].codes.reshape(-1)).all()
        counts[share] = {place.name for place in places if place.zeros_left_out}
    assert not counts[0.0] and counts[0.6] and "first.weight" not in counts[0.6]
    assert sizes[0.6] < sizes[0.0]


def test_code_arrays_hold_all_that_the_network_is_made_of():
    net = spotter().net
    arrays = code_arrays(weight_codes(net, 12), other_parameters(net))
    assert arrays["lstm.w_ih.codes"].dtype == np.int16 and arrays["lstm.w_ih.bits"] == 12
    assert arrays["lstm.w_ih.scale"].shape == (2,)
    weights = sum(array.size for name, array in arrays.items() if name.endswith(".codes"))
    ranges = sum(array.size for name, array in arrays.items() if name.endswith("range") or name.endswith("ranges"))
    assert weights + ranges == sum(parameter.numel() for parameter in net.parameters())

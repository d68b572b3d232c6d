"""Batch sizes and data that change at steps of a run: exact order and exact resume."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from landiff.configs import ConfigError
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.loading.order import BatchOrder, OrderedDataset
from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.data_pipeline.loading.phases import (
    BatchSizes,
    DataPhase,
    Level,
    batch_sizes,
    single_phase,
)
from landiff.data_pipeline.loading.position import check_position
from tests.data_pipeline.data_sets import keys_of, write_column, write_raw

STEPS = 9


def data_set(folder, sizes, mark=""):
    write_raw(folder, sizes, mark=mark or folder.name)
    write_column(folder, "tokens")
    return folder


def video(key):
    """Source video of a clip."""
    return f"video {int(key[:6], 16) % 6}"


def write_videos(folder, sizes):
    """A data set with several clips of each video."""
    write_raw(folder, sizes, folder.name, lambda key: {"source_sha256": video(key)})
    write_column(folder, "tokens")
    return folder


def config(folder, **changes):
    fields = {"manifest": folder, "global_batch_size": 4, "shuffle_window": 2}
    return DataConfig(**(fields | changes))


def loader(phases, rank=0, size=1):
    return PhasedLoader(phases, ["tokens"], dp_rank=rank, dp_size=size)


def take(source, steps):
    """(step, batch size, index, source, key) of the samples of the next batches."""
    taken = []
    for _ in range(steps):
        batch = source.next_batch()
        for sample in batch.samples:
            place = (batch.step, batch.global_batch_size, sample.index)
            taken.append((*place, sample.meta.source, sample.key))
    return taken


def straight(phases, steps=STEPS):
    with loader(phases) as source:
        return take(source, steps)


def ramped(folder):
    return config(folder, global_batch_size=8, ramp={"start": 2, "increment": 2, "steps": 5})


def curriculum(one, two):
    """Ramp from 2 to 4 over 3 steps; from step 4 on other data; from step 6 on larger batches."""
    first = config(one, ramp={"start": 2, "increment": 2, "steps": 3})
    second = config(two, blend=[{"manifest": one}])
    larger = second.model_copy(update={"global_batch_size": 6, "micro_batch_size": 3})
    return (
        DataPhase(0, 0, first),
        DataPhase(1, 4, second),
        DataPhase(2, 6, larger, new_order=False),
    )


def test_a_ramp_goes_through_its_sizes_in_equal_parts():
    data = config("data", global_batch_size=10, ramp={"start": 4, "increment": 2, "steps": 9})
    sizes = batch_sizes(single_phase(data))
    found = [sizes.at(step).global_batch_size for step in range(11)]
    assert found == [4, 4, 4, 6, 6, 6, 8, 8, 8, 10, 10]
    assert [sizes.samples_before(step) for step in (0, 3, 4, 9, 10)] == [0, 12, 18, 54, 64]
    assert [sizes.step_of(samples) for samples in (0, 18, 54, 64)] == [0, 4, 9, 10]
    assert sizes.step_of(19) is None
    steep = config("data", global_batch_size=10, ramp={"start": 4, "increment": 2, "steps": 2})
    sizes = batch_sizes(single_phase(steep))
    assert [sizes.at(step).global_batch_size for step in range(3)] == [4, 6, 10]


def test_a_ramp_continues_through_a_phase_that_names_no_batch_size():
    first = config("data", global_batch_size=6, ramp={"start": 2, "increment": 2, "steps": 8})
    micro = first.model_copy(update={"micro_batch_size": 2})
    last = first.model_copy(update={"global_batch_size": 4, "ramp": None})
    phases = (
        DataPhase(0, 0, first),
        DataPhase(1, 5, micro, new_order=False, new_sizes=False),
        DataPhase(2, 9, last, new_order=False),
    )
    levels = batch_sizes(phases).levels
    assert levels == (
        Level(0, 2, 1),
        Level(4, 4, 1),
        Level(5, 4, 2),
        Level(8, 6, 2),
        Level(9, 4, 1),
    )


def test_a_ramp_reads_the_samples_in_the_order_of_a_constant_batch(tmp_path):
    data = data_set(tmp_path / "one", [4, 5])
    constant = [sample[2:] for sample in straight(single_phase(config(data)), 20)]
    grown = [sample[2:] for sample in straight(single_phase(ramped(data)), 9)]
    assert len(grown) == 2 + 2 + 4 + 4 + 6 + 4 * 8
    assert grown == constant[: len(grown)]


def test_every_bucket_continues_without_gaps_when_the_batch_grows():
    def places(sizes, steps):
        order = BatchOrder(
            [OrderedDataset(np.array([7, 5, 9]), ["wide", "tall", "wide"])],
            seed=1,
            window=2,
            batch_sizes=sizes,
        )
        found = {}
        for step in range(steps):
            batch = sizes.at(step).global_batch_size
            _, located = order.locate(step, np.arange(batch))
            names = {("wide", "tall", "wide")[shard] for shard in located.shard}
            (bucket,) = names
            triples = zip(located.epoch, located.shard, located.slot, strict=True)
            found.setdefault(bucket, []).extend(map(tuple, triples))
        return found

    constant = places(BatchSizes.constant(1), 400)
    grown = places(BatchSizes([Level(0, 2, 1), Level(7, 3, 1), Level(20, 5, 1)]), 40)
    for bucket, taken in grown.items():
        assert len(taken) > 20
        assert taken == constant[bucket][: len(taken)]


def test_appending_a_phase_changes_nothing_before_it(tmp_path):
    one, two = data_set(tmp_path / "one", [4, 5]), data_set(tmp_path / "two", [3, 3])
    phases = curriculum(one, two)
    everything = straight(phases)
    for count, steps in ((1, 4), (2, 6)):
        shorter = straight(phases[:count], steps)
        assert shorter == everything[: len(shorter)]
    plain = config(one)
    with Loader(plain, ["tokens"], dp_rank=0, dp_size=1) as today:
        assert take(today, 5) == straight(single_phase(plain), 5)


def test_orders_have_their_own_epochs_and_other_phases_continue_them(tmp_path):
    one, two = data_set(tmp_path / "one", [4, 5]), data_set(tmp_path / "two", [3, 3])
    everything = straight(curriculum(one, two), 10)
    assert {sample[3] for sample in everything if sample[0] < 4} == {"one"}
    later = [sample[3:] for sample in everything if sample[0] >= 4]
    assert len(later) == 4 + 4 + 4 * 6
    assert len(set(later[:15])) == 15  # an epoch of the blend, through the change at step 6
    assert [sample[2] for sample in everything] == list(range(len(everything)))
    again = (DataPhase(0, 0, config(one)), DataPhase(1, 3, config(one)))
    first, second = straight(again, 3), straight(again, 6)[12:]
    assert [sample[3:] for sample in first] != [sample[3:] for sample in second]


@pytest.mark.parametrize("ahead", [0, 2])
def test_resume_is_exact_at_every_step_on_another_number_of_ranks(tmp_path, ahead):
    one, two = data_set(tmp_path / "one", [4, 5]), data_set(tmp_path / "two", [3, 3])
    phases = [
        DataPhase(
            phase.index,
            phase.first_step,
            phase.config.model_copy(update={"prefetch_batches": ahead, "micro_batch_size": 1}),
            phase.new_order,
        )
        for phase in curriculum(one, two)
    ]
    everything = straight(phases)
    with loader(phases) as source:
        for step in range(STEPS):
            state = source.state_dict()
            with loader(phases, 0, 2) as even, loader(phases, 1, 2) as odd:
                even.load_state_dict(state)
                odd.load_state_dict(state)
                resumed = take(even, STEPS - step) + take(odd, STEPS - step)
            assert sorted(resumed) == everything[-len(resumed) :], step
            take(source, 1)


def test_states_from_before_there_were_phases_still_load(tmp_path):
    data = data_set(tmp_path / "one", [4, 5])
    phases = single_phase(config(data))
    with loader(phases) as source:
        take(source, 3)
        state = source.state_dict()
    assert set(state) == {
        "format",
        "step",
        "consumed_samples",
        "data",
        "num_samples",
        "exclusions",
        "seed",
        "shuffle_window",
        "global_batch_size",
    }
    del state["step"]
    with loader(phases) as source:
        source.load_state_dict(state)
        assert take(source, 1)[0][:2] == (3, 4)


def test_a_grown_data_set_is_refused_with_the_phase_that_allows_it(tmp_path):
    data = data_set(tmp_path / "one", [4, 5])
    before = single_phase(config(data))
    with loader(before) as source:
        first = take(source, 3)
        state = source.state_dict()
    data_set(data, [4, 5, 6])
    with loader(before) as source, pytest.raises(ConfigError) as error:
        source.load_state_dict(state)
    assert "the checkpoint's data order has data = " in str(error.value)
    text = str(error.value).split("`")[-2]
    entry = {"from_step": 3, "data": {"manifest": str(data)}}
    assert yaml.safe_load(text) == {"phases": [entry]}
    after = (*before, DataPhase(1, 3, config(data)))
    with loader(after) as source:
        source.load_state_dict(state)
        grown = take(source, 4)
    assert len({sample[4] for sample in grown}) > 9
    assert grown[0][2] == len(first)


def test_a_larger_batch_is_refused_with_the_phase_that_allows_it(tmp_path):
    data = data_set(tmp_path / "one", [4, 5])
    with loader(single_phase(config(data))) as source:
        take(source, 2)
        state = source.state_dict()
    larger = config(data, global_batch_size=6)
    with loader(single_phase(larger)) as source, pytest.raises(ConfigError) as error:
        source.load_state_dict(state)
    assert "has global_batch_size = 4, this run has 6; set data.global_batch" in str(error.value)
    assert "`phases: [{from_step: 2, data: {global_batch_size: 6}}]`" in str(error.value)


def test_a_complete_order_is_not_opened(tmp_path):
    one, two = data_set(tmp_path / "one", [4, 5]), data_set(tmp_path / "two", [3, 3])
    phases = curriculum(one, two)
    alone = (phases[0], DataPhase(1, 4, config(two)))
    with loader(alone) as source:
        take(source, 5)
        state = source.state_dict()
        rest = take(source, 2)
    (one / "manifest.json").unlink()
    with loader(alone) as source:
        source.load_state_dict(state)
        assert take(source, 2) == rest


@pytest.mark.parametrize(
    ("ramp", "text"),
    [
        ({"start": 16, "increment": 2, "steps": 4}, "ramp.start = 16 does not reach"),
        ({"start": 2, "increment": 4, "steps": 4}, "in parts of ramp.increment = 4"),
    ],
)
def test_a_ramp_that_misses_the_final_size_is_refused(ramp, text):
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        config("data", global_batch_size=8, ramp=ramp)


def test_a_state_without_an_order_of_its_own_has_none(tmp_path):
    check_position({"seed": 0}, {"seed": 0, "ramp": None, "order_first_step": None})
    with pytest.raises(ConfigError, match="has order_first_step = None, this run has 4"):
        check_position({}, {"order_first_step": 4})


def test_videos_that_the_first_phase_holds_out_are_held_out_of_all_phases(tmp_path):
    one = write_videos(tmp_path / "one", [12, 12])
    two = write_videos(tmp_path / "two", [12])
    second = keys_of(0, 12)
    listed = next(key for key in keys_of(1, 12) if video(key) in {video(own) for own in second})
    first = config(one, validation={"clips": [listed]})  # a key that `two` does not have
    phases = (
        DataPhase(0, 0, first),
        DataPhase(1, 3, first.model_copy(update={"manifest": two})),
    )
    with loader(phases) as source:
        held_out = [clip.key for clip in source.held_out.clips]
        taken = take(source, 3)
        state = source.state_dict()
        later = take(source, 6)
        assert [clip.key for clip in source.held_out.clips] == held_out == [listed]
        assert next(iter(source.held_out)).samples[0].key == listed
    assert video(listed) not in {video(sample[4]) for sample in taken + later}
    expected = {key for key in second if video(key) != video(listed)}
    assert {sample[4] for sample in later} == expected
    with loader(phases) as source:
        source.load_state_dict(state)
        assert take(source, 6) == later
        assert [clip.key for clip in source.held_out.clips] == held_out

from __future__ import annotations

import pytest

from torchrec_hilomoe.training import LearningRateSchedule, ScheduleConfig


def test_cosine_ends_at_the_final_factor():
    schedule = LearningRateSchedule(ScheduleConfig("cosine", final_factor=0.1), 100)
    assert schedule.factor(0) == 1
    assert schedule.factor(50) == pytest.approx(0.55)
    assert schedule.factor(100) == pytest.approx(0.1)
    assert schedule.factor(500) == pytest.approx(0.1)


def test_plateau_follows_evaluations():
    schedule = LearningRateSchedule(ScheduleConfig("plateau", plateau_factor=0.1), 100)
    schedule.evaluated(improved=True)
    assert schedule.factor(10) == 1
    schedule.evaluated(improved=False)
    schedule.evaluated(improved=False)
    assert schedule.factor(11) == pytest.approx(0.01)


def test_constant_ignores_evaluations():
    schedule = LearningRateSchedule(ScheduleConfig("constant", warmup_batches=4), 100)
    schedule.evaluated(improved=False)
    assert [schedule.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_warm_up_leads_to_the_factor_of_a_plateau():
    config = ScheduleConfig("plateau", warmup_batches=4, plateau_factor=0.1)
    schedule = LearningRateSchedule(config, 100)
    schedule.evaluated(improved=False)
    assert [schedule.factor(step) for step in (1, 4)] == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decays_begin_behind_the_warm_up(name):
    schedule = LearningRateSchedule(ScheduleConfig(name, warmup_batches=20), 100)
    assert [schedule.factor(step) for step in (20, 60, 100)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decays_go_by_what_was_planned_where_stages_stopped_early(name):
    schedule = LearningRateSchedule(ScheduleConfig(name, final_factor=0.1), 100)
    assert schedule.factor(40, left_out=30) == schedule.factor(70)
    assert schedule.factor(70, left_out=30) == pytest.approx(0.1)

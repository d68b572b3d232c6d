"""Alarms are raised once, end, survive a restart, and say what to do."""

from landiff.training.observe.alarms import AlarmRule, AlarmWatch
from landiff.training.observe.events import EventLog, read_events
from landiff.training.tokenizer.alarms import alarm_rules
from landiff.training.tokenizer.config import AlarmConfig

RULES = [
    AlarmRule("few", "use", 0.5, "alarms.min", "use more"),
    AlarmRule("many", "loss", 10.0, "alarms.max", "use less", above=True),
]


def kinds(folder):
    return [
        (event["step"], event["kind"], event["name"])
        for event in read_events(folder / "events.jsonl")
    ]


def test_an_alarm_is_raised_once_and_ends(tmp_path, caplog):
    watch = AlarmWatch(EventLog(tmp_path, rank=0))
    for step, use in enumerate([0.6, 0.4, 0.3, 0.5, 0.1], 1):
        watch.check(step, RULES, {"use": use})
    assert kinds(tmp_path) == [(2, "alarm", "few"), (4, "alarm over", "few"), (5, "alarm", "few")]
    assert "few: use = 0.4 is below alarms.min = 0.5; use more" in caplog.text


def test_a_restart_does_not_raise_it_again(tmp_path):
    events = EventLog(tmp_path, rank=0)
    AlarmWatch(events).check(3, RULES, {"loss": 11.0})
    AlarmWatch(events).check(5, RULES, {"use": 0.0})
    events.resume(4)
    resumed = AlarmWatch(events)
    resumed.resume()
    resumed.check(5, RULES, {"use": 0.0, "loss": 12.0})
    assert kinds(tmp_path) == [(3, "alarm", "many"), (5, "alarm", "few")]


def test_only_rank_0_writes(tmp_path):
    watch = AlarmWatch(EventLog(tmp_path, rank=1))
    watch.resume()
    watch.check(1, RULES, {"use": 0.0})
    assert not (tmp_path / "events.jsonl").exists()


def test_the_tokenizer_is_not_blamed_for_a_small_batch():
    healthy = {
        "codebook/used_fraction": 0.04,  # 40 of 50 codes, of a codebook of 1000
        "codebook/perplexity": 30.0,
        "codebook/dead_fraction": 0.1,
        "codebook/commitment_ratio": 0.5,
    }
    collapsed = {
        "codebook/used_fraction": 0.001,
        "codebook/perplexity": 1.0,
        "codebook/dead_fraction": 0.9,
        "codebook/commitment_ratio": 100.0,
    }
    for rule in alarm_rules(AlarmConfig(), codebook_size=1000, num_codes=50):
        assert not rule.broken(healthy[rule.tag]), rule
        assert rule.broken(collapsed[rule.tag]), rule
        assert rule.key in rule.describe(collapsed[rule.tag])

"""The predictor on Apache Kafka: exactly once, also when it is killed in the middle."""

import random
import socket
import subprocess
import time

import pytest
from confluent_kafka import Producer
from conftest import Rig, dead_letter_topic, make_transactions, until

from rehearsal.stack import service
from sandbox.registry import Registry
from shared.records import decode_prediction

pytestmark = pytest.mark.kafka


@pytest.fixture
def predictor_rig(apache_rig: Rig, registry: Registry) -> Rig:
    apache_rig.environment |= {"MLFLOW_TRACKING_URI": registry.uri, "DELIVERY": "exactly_once"}
    return apache_rig


def test_an_aborted_batch_is_invisible(apache_rig: Rig) -> None:
    producer = Producer({**apache_rig.properties, "transactional.id": f"test-{time.time_ns()}", "log_level": 0})
    producer.init_transactions(20)
    for value, commit in ((b"aborted", False), (b"committed", True)):
        producer.begin_transaction()
        producer.produce(apache_rig.topic_2, value=value)
        producer.flush(10)
        if commit:
            producer.commit_transaction(10)
        else:
            producer.abort_transaction(10)

    messages = apache_rig.read(apache_rig.topic_2, 1)

    assert [message.value() for message in messages] == [b"committed"]


def test_killed_in_the_middle_again_and_again_it_loses_and_doubles_nothing(predictor_rig: Rig) -> None:
    batch = make_transactions(6000)
    predictor_rig.put_transactions(batch)
    dice = random.Random(4)
    settings = {"MAX_BATCH_SIZE": "50"}
    for _ in range(4):
        process = predictor_rig.start("predictor", **settings)
        time.sleep(dice.uniform(0.05, 0.4))  # the moment of death is the point; nothing is waited for
        process.kill()
    predictor_rig.start("predictor", **settings)

    messages = predictor_rig.read(predictor_rig.topic_2, len(batch), timeout_s=90, extra_s=3)

    identities = [decode_prediction(message.value()).identity for message in messages]
    assert len(identities) == len(set(identities)) == len(batch)
    assert set(identities) == {each.identity for each in batch}


@pytest.mark.alone
def test_killed_and_restarted_it_delays_nobody_for_long(predictor_rig: Rig) -> None:
    batch = make_transactions(3600)
    predictor_rig.put_transactions(batch[:3000])
    first = predictor_rig.start("predictor", MAX_BATCH_SIZE="50")
    until(lambda: first.said("event='processed'"), what="some work")
    first.kill()  # with a transaction open, as a rule
    predictor_rig.put_transactions(batch[3000:])
    second = predictor_rig.start("predictor", ready=False, MAX_BATCH_SIZE="50")
    until(lambda: second.said("event='model_loaded'"), what="the restarted process")
    began = time.monotonic()

    messages = predictor_rig.read(predictor_rig.topic_2, len(batch), extra_s=0)

    assert time.monotonic() - began < 5
    assert len(messages) == len(batch)


@pytest.mark.alone
@pytest.mark.parametrize("registry_is", ["away", "silent"])
def test_killed_and_restarted_without_its_registry_it_goes_on_with_the_last_good_model(
    predictor_rig: Rig, registry_is: str
) -> None:
    batch = make_transactions(200)
    predictor_rig.start("predictor").kill()
    predictor_rig.put_transactions(batch)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if registry_is == "silent" else 9
        predictor_rig.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        predictor_rig.launch = subprocess.Popen  # its libraries are imported, too, before it goes on
        began = time.monotonic()

        process = predictor_rig.start("predictor")

        messages = predictor_rig.read(predictor_rig.topic_2, len(batch), extra_s=0)
        took_s = time.monotonic() - began
    assert took_s < 10
    assert {decode_prediction(each.value()).identity for each in messages} == {each.identity for each in batch}
    assert process.said("event='last_good_model'")


@pytest.mark.alone
def test_killed_for_good_another_takes_over_before_long(predictor_rig: Rig) -> None:
    batch = make_transactions(3600)
    settings = predictor_rig.environment | {"MAX_BATCH_SIZE": "50"}
    first, second = (service("predictor", predictor_rig.directory, settings, replica=number) for number in (1, 2))
    predictor_rig.processes += [first.start(), second.start()]
    until(lambda: first.said("event='revoked'"), what="a share for the second")
    predictor_rig.put_transactions(batch[:3000])
    until(lambda: first.said("event='processed'"), what="some work")
    first.kill()
    predictor_rig.put_transactions(batch[3000:])
    began = time.monotonic()

    predictor_rig.read(predictor_rig.topic_2, len(batch), extra_s=0)

    assert time.monotonic() - began < 25
    messages = predictor_rig.read(predictor_rig.topic_2, len(batch), extra_s=1)
    assert len(messages) == len({decode_prediction(each.value()).identity for each in messages}) == len(batch)


def test_who_takes_a_replica_s_name_takes_its_place(predictor_rig: Rig) -> None:
    first, second = (service("predictor", predictor_rig.directory, predictor_rig.environment) for _ in range(2))
    predictor_rig.processes += [first.start(), second]
    second.spawn()
    until(
        lambda: "check that REPLICA is unique among the replicas" in predictor_rig.log("predictor"),
        what="the hint",
    )
    predictor_rig.put_transactions(make_transactions(500))

    messages = predictor_rig.read(predictor_rig.topic_2, 500, extra_s=2, timeout_s=60)

    assert len(messages) == 500
    assert first.running
    assert second.running


def test_each_card_keeps_its_order(predictor_rig: Rig) -> None:
    batch = make_transactions(3000)
    predictor_rig.put_transactions(batch)
    predictor_rig.start("predictor", MAX_BATCH_SIZE="100")

    messages = predictor_rig.read(predictor_rig.topic_2, len(batch))

    def by_card(identities: list[tuple[int, str]]) -> dict[int, list[str]]:
        return {card: [num for owner, num in identities if owner == card] for card, _ in identities}

    predictions = [decode_prediction(message.value()) for message in messages]
    assert by_card([(each.cc_num, each.trans_num) for each in predictions]) == by_card(
        [(each.cc_num, each.trans_num) for each in batch]
    )


def test_two_share_the_work_and_one_takes_over(predictor_rig: Rig) -> None:
    first = predictor_rig.start("predictor")
    second_log = predictor_rig.directory / "second"
    second_log.mkdir()
    second = Rig(
        second_log,
        predictor_rig.properties,
        predictor_rig.environment | {"REPLICA": "second"},
        predictor_rig.topic_1,
        predictor_rig.topic_2,
        predictor_rig.processes,
    )
    other = second.start("predictor")
    batch = make_transactions(4000)
    predictor_rig.put_transactions(batch[:2000])
    until(lambda: "event='processed'" in second.log("predictor"), what="work for the second")
    assert first.stop() == 0
    predictor_rig.put_transactions(batch[2000:])

    messages = predictor_rig.read(predictor_rig.topic_2, len(batch), timeout_s=60, extra_s=1)

    assert len(messages) == len({decode_prediction(each.value()).identity for each in messages}) == len(batch)
    assert other.running


def test_sigterm_in_the_middle_is_clean(predictor_rig: Rig) -> None:
    batch = make_transactions(12_000)
    predictor_rig.put_transactions(batch)
    process = predictor_rig.start("predictor", MAX_BATCH_SIZE="50")
    until(lambda: "event='processed'" in predictor_rig.log("predictor"), what="some work")
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < 10
    predictor_rig.start("predictor")

    messages = predictor_rig.read(predictor_rig.topic_2, len(batch), timeout_s=60, extra_s=1)

    assert len(messages) == len({decode_prediction(each.value()).identity for each in messages}) == len(batch)


def test_the_largest_record_that_a_topic_takes_fits_into_the_dead_letters(predictor_rig: Rig) -> None:
    huge = b"{" + b"x" * 1_040_000
    producer = Producer({**predictor_rig.properties, "message.max.bytes": "1048500", "log_level": 0})
    producer.produce(predictor_rig.topic_1, huge)
    assert producer.flush(20) == 0
    predictor_rig.put_transactions(make_transactions(20))
    predictor_rig.start("predictor")

    assert len(predictor_rig.read(predictor_rig.topic_2, 20)) == 20
    (letter,) = predictor_rig.read(dead_letter_topic(predictor_rig.topic_1), 1)
    assert letter.value() == huge

"""The alerter: reads predictions from topic_2, and reports every predicted fraud by e-mail, by webhook, or by both."""

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from threading import Event

from services.alerter.channels import configured
from services.alerter.settings import AlerterSettings
from shared import metrics, service
from shared.settings import kafka_properties
from shared.stream.delivery import AtLeastOnce
from shared.stream.loop import open_stream

_TURN_S = 0.5


def serve(settings: AlerterSettings, shutdown: Event) -> None:
    """Send alarms until shutdown. Each channel has its own thread and its own consumer group.

    Raises SettingsError if a setting is missing or invalid.
    """
    properties = kafka_properties(settings)
    channels = configured(settings)
    streams = [
        open_stream(
            settings,
            properties,
            group=channel.group,
            topic=settings.topic_2,
            delivery=AtLeastOnce(properties=properties, shutdown=shutdown),
            shutdown=shutdown,
        )
        for channel in channels
    ]
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [
            pool.submit(stream.run, each.handle, idle=partial(metrics.ALARMS_WAITING.labels(each.name).set, 0))
            for stream, each in zip(streams, channels, strict=True)
        ]
        # The kernel may give a signal to another thread, and only a wait that ends lets the main thread handle it.
        while not wait(running, _TURN_S, FIRST_COMPLETED).done:
            pass
        shutdown.set()  # if one channel fails, stop all channels, so that the container restarts
    for channel, stream in zip(channels, running, strict=True):
        channel.close()
        stream.result()


if __name__ == "__main__":
    service.run("alerter", AlerterSettings, serve)

"""The alerter: every fraud on topic_2 reaches a person, at once, by e-mail and by webhook."""

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from threading import Event

from services.alerter.channels import ByMail, ByWebhook, Channel
from services.alerter.mail import Composer, Mailer
from services.alerter.pace import Pace
from services.alerter.settings import AlerterSettings
from services.alerter.webhook import Webhook
from shared import metrics, service
from shared.dead_letters import Limit
from shared.errors import SettingsError
from shared.kafka.clients import consumer
from shared.settings import kafka_properties
from shared.stream.delivery import AtLeastOnce
from shared.stream.loop import Stream


def channels(settings: AlerterSettings) -> list[Channel]:
    """Those that are configured. Raises SettingsError if there is none, or one of them lacks something."""
    found = [_mail(settings)] if settings.smtp_host else []
    found += [_webhook(settings)] if settings.webhook_url else []
    if settings.smtp_host and settings.webhook_url and settings.alerter_group == settings.webhook_group:
        raise SettingsError("WEBHOOK_GROUP: the same as ALERTER_GROUP, of which each has to be told everything")
    if not found:
        raise SettingsError("SMTP_HOST: missing, and so is WEBHOOK_URL: alarms need a way out")
    return found


def mailer(settings: AlerterSettings) -> Mailer:
    """The way to the mail server."""
    return Mailer(
        host=settings.smtp_host or "",
        port=settings.smtp_port,
        tls=settings.smtp_tls,
        timeout_s=settings.smtp_timeout_seconds,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value() if settings.smtp_password else None,
    )


def serve(settings: AlerterSettings, shutdown: Event) -> None:
    """Raise alarms until shutdown."""
    properties = kafka_properties(settings)
    configured = channels(settings)
    streams = [
        Stream(
            make_consumer=lambda on_error, group=channel.group: consumer(  # type: ignore[misc]
                properties, group=group, replica=settings.replica, on_error=on_error
            ),
            group=channel.group,
            topic=settings.topic_2,
            delivery=AtLeastOnce(properties=properties, shutdown=shutdown),
            settings=settings,
            shutdown=shutdown,
        )
        for channel in configured
    ]
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [
            pool.submit(stream.run, each.handle, idle=partial(metrics.ALARMS_WAITING.labels(each.name).set, 0))
            for stream, each in zip(streams, configured, strict=True)
        ]
        wait(running, return_when=FIRST_COMPLETED)
        shutdown.set()  # one that broke takes the others with it: all are started again
    for channel, stream in zip(configured, running, strict=True):
        channel.close()
        stream.result()


def _mail(settings: AlerterSettings) -> Channel:
    if not settings.alert_from:
        raise SettingsError("ALERT_FROM: missing")
    if not settings.alert_to:
        raise SettingsError("ALERT_TO: missing")
    return ByMail(
        mailer(settings),
        Composer(sender=settings.alert_from, recipients=settings.alert_to, templates=settings.alert_templates),
        group=settings.alerter_group,
        pace=Pace(burst=settings.alert_burst, window_s=settings.alert_digest_seconds),
        limit=_limit(settings),
        largest_digest=max(1, settings.max_batch_size // 2),
    )


def _webhook(settings: AlerterSettings) -> Channel:
    if not settings.webhook_secret:
        raise SettingsError("WEBHOOK_SECRET: missing")
    try:
        webhook = Webhook(
            url=settings.webhook_url or "",
            secret=settings.webhook_secret.get_secret_value(),
            timeout_s=settings.webhook_timeout_seconds,
        )
    except ValueError as error:
        raise SettingsError(f"WEBHOOK_SECRET: {error}") from None
    return ByWebhook(webhook, group=settings.webhook_group, limit=_limit(settings))


def _limit(settings: AlerterSettings) -> Limit:
    return Limit(ratio=settings.dead_letter_limit_ratio, consecutive=settings.dead_letter_limit_consecutive)


if __name__ == "__main__":
    service.run("alerter", AlerterSettings, serve)

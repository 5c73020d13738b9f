"""Commands about creatives: who made a file and how, what waits for a person, and what was refused."""

from __future__ import annotations

import getpass
import time
from typing import TYPE_CHECKING, Annotated

import typer

from osmf.commands.common import Json, command_settings, fail, show

if TYPE_CHECKING:
    from generator.review import ReviewRecord, ReviewStatus
    from streams.events import Event, Verdict

creative = typer.Typer(
    name="creative", help="Creatives: their labels, and what people say of them.", no_args_is_help=True
)

CreativeId = Annotated[str, typer.Argument(metavar="ID", help="Id of a creative of the queue.")]
Reason = Annotated[str, typer.Option(help="Why, in your own words; it is kept.")]
By = Annotated[str | None, typer.Option(help="Who says so; default: the user of this machine.")]


@creative.command("show")
def show_label(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A creative's file: a path or an fsspec URL.")],
    json: Json = None,
) -> None:
    """Show what a creative's file says of itself, and verify it; ends with 1 if it is not as it was published."""
    from generator.certificate import CertificateRefused, trusted_anchors
    from generator.storage import ImageUnreadable
    from osmf.label import label_figures, label_table, read_label

    try:
        signing = command_settings().generator.signing
        label = read_label(file, anchors=trusted_anchors(signing), signed=signing.mode != "off")
    except (ImageUnreadable, CertificateRefused) as error:
        raise fail(error) from error
    show(label_figures(label), json, [label_table(label)])
    if label.problems:
        raise fail("\n".join(label.problems))


@creative.command("queue")
def show_queue(json: Json = None) -> None:
    """List the creatives that wait for a person (`generator.approval` is manual)."""
    _list("waiting", json)


@creative.command("refused")
def show_refused(
    by_people: Annotated[bool, typer.Option("--by-people", help="Those that people rejected, not the checks.")] = False,
    json: Json = None,
) -> None:
    """List the creatives that the checks have refused, with the reason and the picture."""
    _list("rejected" if by_people else "refused", json)


@creative.command()
def accept(creative_id: CreativeId, reason: Reason = "", by: By = None) -> None:
    """Accept a creative that waits: the generator publishes it, now or when it next runs."""
    _decide(creative_id, "accepted", reason, by)


@creative.command()
def reject(creative_id: CreativeId, reason: Reason = "", by: By = None) -> None:
    """Reject a creative that waits: it is never published, and kept with the reason."""
    _decide(creative_id, "rejected", reason, by)


@creative.command("request")
def request_creatives(
    product_id: Annotated[str, typer.Argument(metavar="PRODUCT", help="Id of a product.")],
    group: Annotated[int | None, typer.Option(min=0, help="One of its groups; default: all of them.")] = None,
    reason: Reason = "",
    by: By = None,
) -> None:
    """Ask for new creatives of a product, whatever they cost: the generator makes them, now or when it next runs."""
    import hashlib

    from streams.events import CreativeRequested

    _check_group(product_id, group)
    requested_by, now_ms = by or getpass.getuser(), time.time_ns() // 1_000_000
    digest = hashlib.sha256(f"{product_id}|{group}|{requested_by}|{now_ms}".encode()).hexdigest()
    event = CreativeRequested(
        event_id=f"request-{digest[:24]}",
        product_id=product_id,
        requested_by=requested_by,
        requested_at_ms=now_ms,
        group_id=group,
        reason=reason,
    )
    _send(event, f"nothing was asked for {product_id}")
    of_what = product_id if group is None else f"group {group} of {product_id}"
    typer.echo(f"{event.event_id}: creatives for {of_what}; a running `osmf generator` makes them, or the next one")


def _check_group(product_id: str, group: int | None) -> None:
    """Refuse a product or a group that the online state does not have."""
    from state.errors import StateError
    from state.reading import StateReader

    try:
        with StateReader(command_settings().state.path) as reader, reader.view() as view:
            if product_id not in {product.product_id for product in view.products()}:
                raise fail(f"no product {product_id!r} has been registered; nothing was asked for")
            groups = view.groups(product_id)
    except StateError as error:
        raise fail(error) from error
    known = [] if groups is None else [each.group_id for each in groups.groups]
    if not known or group not in {None, *known}:
        has = f"has the groups {', '.join(map(str, known))}" if known else "has no groups yet"
        raise fail(f"product {product_id!r} {has}; nothing was asked for")


def _list(status: ReviewStatus, json: str | None) -> None:
    from osmf.review_queue import review_figures, review_table

    reviews = _reviews(status)
    show(review_figures(reviews, status), json, [review_table(reviews, status)])


def _decide(creative_id: str, verdict: Verdict, reason: str, by: str | None) -> None:
    from streams.events import CreativeReviewed

    waiting = {review.creative_id: review for review in _reviews("waiting")}
    if creative_id not in waiting:
        raise fail(
            f"no creative {creative_id!r} waits; `osmf creative queue` lists those that do. Nothing was decided."
        )
    event = CreativeReviewed(
        creative_id=creative_id,
        product_id=waiting[creative_id].product_id,
        verdict=verdict,
        reviewed_by=by or getpass.getuser(),
        reviewed_at_ms=time.time_ns() // 1_000_000,
        reason=reason,
    )
    _send(event, f"{creative_id} still waits")
    typer.echo(
        f"{creative_id} is {verdict}; a running `osmf generator` carries it out now, or the next one that starts"
    )


def _send(event: Event, otherwise: str) -> None:
    from kafka.errors import KafkaError

    from streams.producer import EventProducer, SendError

    try:
        with EventProducer(command_settings().streams, client_id="osmf-creative") as producer:
            producer.send(event)
            producer.flush()
    except (SendError, KafkaError) as error:
        raise fail(f"the event could not be sent ({error.__cause__ or error}): {otherwise}") from error


def _reviews(status: ReviewStatus) -> list[ReviewRecord]:
    from generator.inventory import read_reviews
    from state.errors import StateError, StateMissingError
    from state.store import Store

    path = command_settings().generator.state_path
    try:
        with Store(path, readonly=True) as own:
            return read_reviews(own, status)
    except StateMissingError as error:
        raise fail(f"no state at {path} (generator.state_path): `osmf generator` has not run with it yet") from error
    except StateError as error:
        raise fail(error) from error

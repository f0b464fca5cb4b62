"""What a round would send, seen before joining: a short round on the hospital's own images, of which nothing leaves."""

import secrets
import shutil
from typing import Any

import torch

from fedssl import wire
from fedssl.answering import Answer, answer, configuration
from fedssl.build import build_method, first_state
from fedssl.build_images import root_of, store_folder
from fedssl.build_privacy import is_private
from fedssl.config import Config, as_text, fingerprint
from fedssl.deployment.agent import own_folders
from fedssl.deployment.desk import describe
from fedssl.deployment.settings import POLICY_FILE, SiteKit
from fedssl.frames import write_frame
from fedssl.methods.base import PROTOTYPES
from fedssl.order import Order
from fedssl.packing import pack
from fedssl.site.egress_file import prepared
from fedssl.site.rules import RulesFile
from fedssl.update import METRICS, Update

_STEPS = 2


def dry_run(kit: SiteKit) -> dict[str, Any]:
    """Make what the manifest would say of a round of the kit's plan.

    A plain round is trained for two steps from random weights. A private one is not trained, as that would cost the
    patients' budget: its tensors are those of the random weights and its figures are zeros.

    Args:
        kit: the site's.

    Returns:
        An entry of the manifest, or that of the refusal.

    Raises:
        FedsslError: plan or policy cannot be read.
    """
    own_folders(kit)
    overrides = as_text(["data.root=unused", *kit.plan, f"training.local_steps={_STEPS}"])
    config = configuration(overrides)
    order = Order(
        secrets.token_hex(8), 1, int(config["federation"]["rounds"]), fingerprint(config),
        precision=str(config["federation"]["precision"]),
    )  # fmt: skip
    given = _untrained(config, kit.site, order) if is_private(config, kit.site) else _trained(kit, overrides, order)
    return prepared(describe("train", given, write_frame({}, given.content)))


def _trained(kit: SiteKit, overrides: str, order: Order) -> Answer:
    config = configuration(overrides)
    state = first_state(config, build_method(config))
    rules = RulesFile(kit.folder / POLICY_FILE).current()
    node_config = {**kit.node_config(), **rules.node_config()}
    try:
        return answer("train", overrides, wire.write_order(order, pack(state, order.precision)), node_config)
    finally:
        memory = store_folder(config, root_of(config, kit.data, site=kit.site)) / "state" / order.run
        shutil.rmtree(memory, ignore_errors=True)


def _untrained(config: Config, site: str, order: Order) -> Answer:
    method = build_method(config)
    state = first_state(config, method)
    count = torch.zeros(len(state[PROTOTYPES])) if PROTOTYPES in state else None
    metrics = dict.fromkeys(sorted(METRICS | set(method.terms)), 0.0)
    update = Update(site, state, 0, 0, count, count, metrics)
    return Answer(wire.write_update(update, order.precision, state), order)

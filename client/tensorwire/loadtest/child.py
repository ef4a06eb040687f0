"""The process that sends: `python -m tensorwire.loadtest.child`, driven by lines of JSON.

    in   {"plan": …, "number": 0}
    out  {"is": "ready"}                       connected
    in   {"start": 1234.5}                     monotonic seconds, the same in all processes
    out  {"is": "progress", "groups": …}       every second
    out  {"is": "result", …} or {"is": "failed", "message": …}

It does nothing else, so that drawing and writing never delay a send.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import TensorwireError

from tensorwire.loadtest.driver import Share
from tensorwire.loadtest.plan import Plan
from tensorwire.loadtest.precise_loop import new_precise_loop
from tensorwire.loadtest.runner import Runner

if TYPE_CHECKING:
    from tensorwire.loadtest.targets import Target


def target_of(plan: Plan) -> Target:
    """Return the target that a plan names."""
    if plan.kind == "openai":
        from tensorwire.loadtest.openai_target import OpenAiTarget

        return OpenAiTarget(plan.address, connections=plan.connections)
    from tensorwire.loadtest.tensorwire_target import TensorwireTarget

    return TensorwireTarget(
        plan.address,
        connections=plan.connections,
        attempts=plan.attempts,
        verify=plan.verify,
        slow_s=plan.trouble().slow_s,
    )


def main() -> int:
    """Do one share of a run; return the exit code."""
    order = json.loads(sys.stdin.readline())
    try:
        with asyncio.Runner(loop_factory=new_precise_loop) as runner:
            result = runner.run(_run(Plan.from_json(order["plan"]), order["number"]))
    except (TensorwireError, OSError) as error:
        _say({"is": "failed", "message": str(error)})
        return 1
    _say({"is": "result"} | result)
    return 0


async def _run(plan: Plan, number: int) -> dict[str, Any]:
    target = target_of(plan)
    try:
        await target.connect()
        _say({"is": "ready"})
        start: float = json.loads(sys.stdin.readline())["start"]
        runner = Runner(plan, target, Share(number=number, of=plan.processes), start)
        reporting = asyncio.create_task(
            runner.report(lambda groups: _say({"is": "progress", "groups": groups}))
        )
        try:
            return await runner.run()
        finally:
            reporting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reporting
    finally:
        await target.close()


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message, separators=(",", ":")) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

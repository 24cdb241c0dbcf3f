"""`adapterd users`: binding the users of a running server."""

from __future__ import annotations

import json
import re

from tests.commands.invoke import Command
from tests.e2e.uploads import lora
from tests.process import ServerProcess


def test_binding_users(ask: Command, tiny_server: ServerProcess) -> None:
    tiny_server.upload("cli-user", lora(3))
    assert json.loads(ask("users", "bind", "cli-ann", "cli-user").stdout)["adapter_id"] == "cli-user"
    assert re.search(r"^ *cli-ann +cli-user *$", ask("users", "list").stdout, re.M)
    assert ask("users", "unbind", "cli-ann").exit_code == 0
    assert "cli-ann" not in ask("users", "list").stdout
    missing = ask("users", "bind", "cli-ann", "nobody")
    assert (missing.exit_code, missing.stderr) == (1, "adapterd: 404 adapter 'nobody' does not exist\n")
    tiny_server.http.delete("/adapters/cli-user")


def test_ids_that_need_escaping_in_a_path(ask: Command, tiny_server: ServerProcess) -> None:
    """A name with a question mark or a percent sign is refused for what it is, never taken for another."""
    tiny_server.upload("a", lora(4))
    for name in ("a?b", "a#b", "%61"):
        for verb in ("show", "delete"):
            result = ask("adapters", verb, name)
            assert result.exit_code == 1
            assert name in result.stderr
        assert ask("users", "unbind", name).exit_code == 1
    assert ask("adapters", "delete", "a").exit_code == 0

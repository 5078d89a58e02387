"""What no JSON schema says about a request: which model there is, how many tokens, what excludes each other."""

from typing import Any

import schemathesis

from tests.support.server import MODEL


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Let most requests come to the models: values of the right type become ones that are here."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    own = body.get("fusionroute")
    if isinstance(own, dict):
        own |= {name: None for name in ("expert", "precision") if isinstance(own.get(name), str)}
        own |= {"routing": True} if isinstance(own.get("candidates"), int) and isinstance(own.get("routing"), bool) else {}
    return body

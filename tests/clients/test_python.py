"""OpenAI's client for Python against the README's command: the tests of tests/runtime/serve, on the shipped system.

Slow: `make test-clients`.
"""

import pytest

from tests.runtime.serve.test_openai_client import *  # noqa: F403

# Gemma's template takes no such roles
del test_calls_and_what_they_returned_reach_the_template  # noqa: F821
pytestmark = pytest.mark.slow

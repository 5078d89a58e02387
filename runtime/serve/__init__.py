"""A server of one bundle that speaks OpenAI's protocol. Needs the extra `serve`.

From top to bottom: `server` listens and shuts down, `app` has the routes, `answers` and `streaming` write what they
return and `replies` tells, `tool_calls` and `requests` read what clients send, `jobs` runs texts in threads within
`admission`'s bounds, `guard` stands before all of it.
"""

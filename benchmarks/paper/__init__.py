"""The comparison of the FusionRoute paper, on systems small enough to train here. It writes docs/results.md.

`__main__` trains, exports and measures every method, `routing_choices` looks at the tokens where experts differ,
`results` fills results.template.md with tables and pictures.
"""

"""Which expert spoke: answers as pages whose tokens are coloured by expert.

details.py         what is told of a token          recording.py   a stream, and when its tokens came
page.py            one page of HTML with an answer in it, from answer.html.jinja
answer.js, .css    draw an answer; playground.* ask the server for one, and share it as such a page
"""

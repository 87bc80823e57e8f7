"""The HTTP server: OpenAI's API on top of fastdllm.Engine (`pip install "fastdllm[serve]"`).

    settings.py   what a server is told when it starts
    asked.py      a request's JSON -> what is asked, or the refusal that names the parameter
    service.py    what is asked -> answers of the engine, piece by piece
    writing.py    an answer's text as its tokens become final, and where a stop string ends it
    shapes.py     answers as OpenAI's API writes them
    metrics.py    what Prometheus reads
    canvas.py     what the page (page.html) shows: a canvas event by event
    app.py        the FastAPI application
    server.py     `fastdllm serve`: uvicorn, and how it starts and ends

The packages of the extra are imported inside the functions that need them.
"""

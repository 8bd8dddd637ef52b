# Serves a bundle made by `export`, without torch:
#   docker build -t classifier .
#   docker run --rm --stop-timeout 40 -p 127.0.0.1:8000:8000 -v ./runs/latest/bundle:/bundle:ro -e SERVE_TOKEN classifier
# 40 seconds are enough to answer accepted requests (--timeout 30). To use another port, change the first number after -p.
FROM python:3.11-slim

WORKDIR /app
COPY constraints.txt requirements-serve.txt pyproject.toml README.md LICENSE ./
COPY project project
RUN pip install --no-cache-dir --constraint constraints.txt --requirement requirements-serve.txt \
    && pip install --no-cache-dir --no-deps . \
    && useradd --no-create-home --uid 10001 server

USER server
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["python", "-m", "project.cli", "serve", "/bundle", "--host", "0.0.0.0"]

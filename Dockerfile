# `archerchat serve` for the models of a mounted home.
#
#   docker build -t archerchat .                            # CPU
#   docker build -t archerchat --build-arg TORCH=cu130 .    # CUDA: torch's name of the version
#   docker run -p 127.0.0.1:8000:8000 -v ~/.cache/archerchat:/models:ro archerchat
#   docker run --gpus all -e ARCHERCHAT_API_KEY -p 8000:8000 -v ...:/models:ro archerchat --model d12:sft
#
# What comes after the image's name are more options of `archerchat serve`.
FROM python:3.12-slim
ARG TORCH=cpu
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend="$TORCH" "torch>=2.11"
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
COPY endlex endlex
RUN ENDLEX_REQUIRE_ASSETS=1 pip install --no-cache-dir ./endlex ".[serve]" \
    && useradd --create-home archer
# USER names whoever runs it, also under `docker run --user`.
ENV ARCHERCHAT_HOME=/models USER=archer
USER archer
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["archerchat", "serve", "--host", "0.0.0.0", "--port", "8000"]

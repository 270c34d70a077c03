# CPU image with the codec and its bundled model; no torch.
#   docker build -t vpcodec .
#   docker run --rm -v "$PWD:/data" vpcodec encode in.wav out.tok
FROM python:3.12-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vpcodec vpcodec
COPY checkpoints checkpoints
COPY web web
RUN pip install --no-cache-dir . && rm -rf /src
WORKDIR /data
ENTRYPOINT ["vpcodec"]
CMD ["--help"]

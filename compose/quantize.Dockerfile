# llm-compressor in the model server's own image, beside its torch: its other pins are not vLLM's.
ARG LLM_VLLM_IMAGE
FROM ${LLM_VLLM_IMAGE}
USER 0
COPY gateway/modelserver/locks/quantize.lock /opt/quantize.lock
# Whoever builds, everyone can read what is in the image.
RUN python3 -m pip install --quiet --no-cache-dir --no-deps --require-hashes --only-binary :all: --target /opt/quantize -r /opt/quantize.lock \
 && chmod -R a+rX /opt/quantize
ENV PYTHONPATH=/opt/quantize

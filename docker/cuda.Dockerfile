# docker build -f docker/cuda.Dockerfile -t opdlm:cuda . && docker run -it --gpus all -v opdlm:/work opdlm:cuda env
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip install --no-cache-dir -c /source/requirements.lock "/source[demo,serve,quant]" && rm -r /source
WORKDIR /work
ENV HF_HOME=/work/hf
ENTRYPOINT ["opdlm"]

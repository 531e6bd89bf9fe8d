# docker build -f docker/cpu.Dockerfile -t opdlm . && docker run -it -v opdlm:/work opdlm demo
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY . /source
RUN pip install --no-cache-dir -c /source/requirements.lock "/source[demo,serve]" && rm -r /source
WORKDIR /work
ENV HF_HOME=/work/hf
ENTRYPOINT ["opdlm"]

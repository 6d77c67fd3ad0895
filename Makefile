# make            build/chimera            make test       everything that proves it (minutes)
# make run        answer a prompt          make test-full  the long sweeps as well
# make bench      measure                  make ladder    how the kernels became fast, by steps
# make bench-cuda every kernel, and steps of a 7B shape, on this machine's GPU
# make gpu-bundle all that another machine needs to test and measure them: build/gpu-bundle
# make clean
#
# DEBUG=1   SANITIZE=address,undefined
# CUDA=0|1  with the CUDA backend (default: where nvcc is found)   CUDA_ARCHS="80 89 90a"
# PROMPT="..." ARGS="--temp 0.7 ..."  for make run

PROMPT ?= Why is the sky blue? Answer in three sentences.
ARGS   ?=
CXX    ?= g++
BUILD  ?= build$(if $(SANITIZE),-$(subst $(comma),-,$(SANITIZE)))$(if $(filter 1,$(DEBUG)),-debug)
comma  := ,

NVCC   ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
CUDA   ?= $(if $(SANITIZE),0,$(if $(NVCC),1,0))
# sm_80: A100; 89: RTX 40, L4; 90a: H100, H200. Later ones compile the PTX of 90 when they first run it.
CUDA_ARCHS ?= 80 89 90a
ifeq (1,$(CUDA))
ifeq (,$(NVCC))
$(error CUDA=1: expected nvcc on the PATH or in /usr/local/cuda/bin, found none; install the CUDA Toolkit or build with CUDA=0)
endif
CUDA_HOME := $(abspath $(dir $(realpath $(shell command -v $(lastword $(NVCC)))))/..)
HAS_GPU   := $(wildcard /dev/nvidia0)
else ifneq (,$(filter bench-cuda gpu-bundle,$(MAKECMDGOALS)))
$(error $(filter bench-cuda gpu-bundle,$(MAKECMDGOALS)): expected nvcc on the PATH or in /usr/local/cuda/bin, and not CUDA=0; install the CUDA Toolkit)
endif

CXXFLAGS := -std=c++20 -I. -Wall -Wextra -Wpedantic -Werror -g -MMD -MP -ffp-contract=off \
            $(if $(filter 1,$(DEBUG)),-O0,-O2) $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all)
LDFLAGS  := -pthread $(if $(SANITIZE),-fsanitize=$(SANITIZE)) \
            $(if $(filter 1,$(CUDA)),-static-libstdc++ -static-libgcc -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt)

# Files of one instruction set carry its name; nothing else is compiled with its flags.
FLAGS_avx2   := -mavx2 -mfma -mf16c
FLAGS_avxvnni := $(FLAGS_avx2) -mavxvnni
# (g++ 12 warns inside its own AVX-512 headers.)
FLAGS_avx512 := $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512 \
                -Wno-uninitialized -Wno-maybe-uninitialized
FLAGS_avx512bf16 := $(FLAGS_avx512) -mavx512bf16
FLAGS_amx    := $(FLAGS_avx512) -mamx-tile -mamx-int8 -mamx-bf16

# -fmad=false: a product and a sum round twice unless the source says fma (cuda/contract.cuh).
NVCCFLAGS := -std=c++20 -I. -O3 --compress-mode=size -fmad=false --expt-relaxed-constexpr -diag-suppress 1046 --threads 0 \
             -Werror all-warnings -Xptxas -warn-spills -Xcompiler -Wall,-Wextra -ccbin $(lastword $(CXX)) \
             -DCHIMERA_CUDA_ARCHS='"$(CUDA_ARCHS), PTX 90"' -gencode arch=compute_90,code=compute_90 \
             $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a))

LIBRARY := $(wildcard engine/*.cc engine/*/*.cc tokenizer/*.cc loader/*.cc) \
           $(if $(filter 1,$(CUDA)),cuda/cuda_backend.cu,cuda/stub.cc)
PROGRAM := $(wildcard tools/*.cc tools/bench/*.cc tools/train/*.cc)
LADDER  := $(wildcard tools/ladder/*.cc)
# The tests run the CUDA kernels on the CPU, on machines with a toolkit and without.
TESTS   := $(wildcard tests/*.cc) cuda/emulator.cc cuda/emulated_backend.cc

objects  = $(addprefix $(BUILD)/obj/,$(addsuffix .o,$(basename $(1))))
isa      = $(FLAGS_$(lastword $(subst _, ,$(basename $(notdir $(1))))))

.PHONY: all run test test-full bench bench-cuda ladder gpu-bundle clean prepare
all: $(BUILD)/chimera

MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
comma_list = $(subst $(eval) ,$(comma),$(strip $(1)))
BENCH_PROMPTS := --limit 8 --prompts $(call comma_list,tools/bench/repeats.jsonl $(wildcard \
                 $(addprefix ../shared/data/prompts/,mt_bench.jsonl gsm8k_80.jsonl)))
DRAFT := $(addprefix --draft ,$(wildcard models/smollm2-135m-instruct.chimera.safetensors))
ifeq (0,$(MAKELEVEL))
MAKEFLAGS += -j$(shell nproc)
endif

# Each of these first installs and fetches what is missing, then builds: in that order, since the
# sources need the headers.
run: export CHIMERA_PROMPT = $(value PROMPT)
run: prepare
	@$(BUILD)/chimera run -m $(MODEL) $(DRAFT) -p "$$CHIMERA_PROMPT" $(ARGS)

test: prepare
	@CHIMERA_BUILD=$(BUILD) CHIMERA_BINARY=$(BUILD)/chimera $(BUILD)/chimera_tests --gtest_brief=1 --gtest_filter='-*Full.*'
	@$(if $(HAS_GPU),$(BUILD)/gpu_tests --gtest_brief=1)

test-full: prepare
	@CHIMERA_BUILD=$(BUILD) CHIMERA_BINARY=$(BUILD)/chimera $(BUILD)/chimera_tests --gtest_brief=1

bench: prepare
	@$(BUILD)/chimera bench -m $(MODEL) $(DRAFT) $(BENCH_PROMPTS) $(ARGS)

ladder:
	@tools/install_deps.sh
	@$(MAKE) -s --no-print-directory $(BUILD)/ladder
	@$(BUILD)/ladder

bench-cuda: $(BUILD)/bench_cuda $(BUILD)/chimera
	@$(BUILD)/bench_cuda
	@for type in bf16 q8_0 q4_0; do $(BUILD)/chimera bench --device cuda --shape llama-2-7b --type $$type || exit; done

# gpu_check.sh runs what lies beside it. The model is apart, in halves, to be laid beside it too.
gpu-bundle: $(addprefix $(BUILD)/gpu-bundle/,chimera gpu_tests bench_cuda)
	@cp tools/gpu_check.sh $(wildcard models/*.chimera.safetensors) $(BUILD)/gpu-bundle
	@for d in tiny-quants stories260K; do [ ! -d ../shared/data/models/$$d ] || { \
	  mkdir -p $(BUILD)/gpu-bundle/shared/data/models && cp -r ../shared/data/models/$$d $(BUILD)/gpu-bundle/shared/data/models/; }; done
	@[ ! -f $(MODEL) ] || { mkdir -p $(BUILD)/gpu-model && split -b 56M -d -a 1 $(MODEL) $(BUILD)/gpu-model/model.gguf.; }
	@du -sh $(BUILD)/gpu-bundle $(wildcard $(BUILD)/gpu-model)

$(BUILD)/gpu-bundle/%: $(BUILD)/%
	@mkdir -p $(@D)
	@strip -o $@ $<

prepare:
	@tools/install_deps.sh
	@tools/fetch_model.sh || echo "continuing without the model"
	@$(MAKE) -s --no-print-directory $(BUILD)/chimera $(if $(filter test%,$(MAKECMDGOALS)),$(BUILD)/chimera_tests $(if $(HAS_GPU),$(BUILD)/gpu_tests))

$(BUILD)/libchimera.a: $(call objects,$(LIBRARY)) $(BUILD)/cuda-$(CUDA)
	@rm -f $@
	@ar rcs $@ $(filter %.o,$^)

# Changes with CUDA=, and so makes the library be put together anew.
$(BUILD)/cuda-$(CUDA):
	@mkdir -p $(@D)
	@rm -f $(BUILD)/cuda-?
	@touch $@

$(BUILD)/chimera: $(call objects,$(PROGRAM)) $(BUILD)/libchimera.a
	@echo "  $@"
	@$(CXX) -o $@ $^ $(LDFLAGS)

$(BUILD)/chimera_tests: $(call objects,$(TESTS) $(filter-out tools/main.cc,$(PROGRAM))) $(BUILD)/libchimera.a
	@echo "  $@"
	@$(CXX) -o $@ $^ $(LDFLAGS) -lgtest_main -lgtest

$(BUILD)/ladder: $(call objects,$(LADDER)) $(BUILD)/libchimera.a
	@echo "  $@"
	@$(CXX) -o $@ $^ $(LDFLAGS)

# The tests of the kernels again, on the GPU.
GPU_TESTS := tests/cuda_linear_test.cc tests/cuda_kernels_test.cc tests/cuda_train_test.cc
$(BUILD)/gpu_tests: $(addprefix $(BUILD)/gpu-obj/,$(GPU_TESTS:.cc=.o)) \
                    $(call objects,tests/cuda_backend_test.cc tests/cuda_draft_test.cc cuda/emulator.cc cuda/emulated_backend.cc) \
                    $(BUILD)/libchimera.a
	@echo "  $@"
	@$(CXX) -o $@ $^ $(LDFLAGS) -lgtest_main -lgtest

$(BUILD)/bench_cuda: $(call objects,cuda/bench_cuda.cu) $(BUILD)/libchimera.a
	@echo "  $@"
	@$(CXX) -o $@ $^ $(LDFLAGS)

$(BUILD)/gpu-obj/%.o: %.cc
	@mkdir -p $(@D)
	@echo "  $< for the GPU"
	@$(NVCC) -x cu $(NVCCFLAGS) -MD -MP -MF $(@:.o=.d) -c -o $@ $<

$(BUILD)/obj/%.o: %.cc
	@mkdir -p $(@D)
	@echo "  $<"
	@$(CXX) $(CXXFLAGS) $(call isa,$<) -c -o $@ $<

$(BUILD)/obj/%.o: %.cu
	@mkdir -p $(@D)
	@echo "  $<"
	@$(NVCC) $(NVCCFLAGS) -MD -MP -MF $(@:.o=.d) -c -o $@ $<

clean:
	rm -rf build build-*

-include $(patsubst %.o,%.d,$(call objects,$(LIBRARY) $(PROGRAM) $(LADDER) $(TESTS) cuda/bench_cuda.cu) \
           $(addprefix $(BUILD)/gpu-obj/,$(GPU_TESTS:.cc=.o)))

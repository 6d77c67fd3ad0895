# make            build/chimera            make test       everything that proves it (minutes)
# make deps       install what it needs    make test-full  the long sweeps as well
# make run        answer a prompt          make ladder     how the kernels became fast, by steps
# make bench      measure                  make install    to PREFIX=/usr/local, below DESTDIR=
# make bench-cuda every kernel, and steps of a 7B shape, on this machine's GPU
# make gpu-bundle all that another machine needs to test and measure them: build/gpu-bundle
# make clean
#
# DEBUG=1   SANITIZE=address,undefined   BUILD=folder
# CXX, CXXFLAGS, CPPFLAGS, LDFLAGS: yours come after those that it needs. WERROR=0|1
# CUDA=0|1  with the CUDA backend (default: where nvcc is found)   CUDA_ARCHS="80 89 90a"
# PROMPT="..." ARGS="--temp 0.7 ..."  for make run

PROMPT ?= Why is the sky blue? Answer in three sentences.
ARGS   ?=
CXX    ?= g++
BUILD  ?= build$(if $(SANITIZE),-$(subst $(comma),-,$(SANITIZE)))$(if $(filter 1,$(DEBUG)),-debug)
PREFIX ?= /usr/local
comma  := ,

NVCC   ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
# --compress-mode came with 12.8. Debian 12 has 11.8, which knows no C++20 either.
NVCC_VERSION := $(if $(NVCC),$(if $(filter 0,$(CUDA)),,$(shell $(NVCC) --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')))
NVCC_IS_NEW  := $(if $(NVCC_VERSION),$(shell awk 'BEGIN { if ($(NVCC_VERSION) >= 12.8) print 1 }'))
CUDA   ?= $(if $(SANITIZE),0,$(if $(NVCC_IS_NEW),1,0))
# sm_80: A100; 89: RTX 40, L4; 90a: H100, H200. Later ones compile the PTX of 90 when they first run it.
CUDA_ARCHS ?= 80 89 90a
NVCC_FOUND := $(if $(NVCC_VERSION),$(NVCC_VERSION) at $(NVCC),none)
ifeq (1,$(CUDA))
ifeq (,$(NVCC_IS_NEW))
$(error CUDA=1: expected nvcc 12.8 or later on the PATH or in /usr/local/cuda/bin, found $(NVCC_FOUND); install the CUDA Toolkit or build with CUDA=0)
endif
CUDA_HOME := $(abspath $(dir $(realpath $(shell command -v $(lastword $(NVCC)))))/..)
HAS_GPU   := $(wildcard /dev/nvidia0)
else ifneq (,$(filter bench-cuda gpu-bundle,$(MAKECMDGOALS)))
$(error $(filter bench-cuda gpu-bundle,$(MAKECMDGOALS)): expected nvcc 12.8 or later on the PATH or in /usr/local/cuda/bin, and not CUDA=0; install the CUDA Toolkit)
else ifneq (,$(if $(NVCC_IS_NEW),,$(NVCC_VERSION)))
$(if $(filter 0,$(MAKELEVEL)),$(shell echo "building without CUDA: expected nvcc 12.8 or later, found $(NVCC_FOUND)" >&2))
endif

# Warnings are errors with the compiler that the code is kept clean with. Others have new ones, and
# who only wants to build must not be stopped by them.
CXX_VERSION := $(shell $(CXX) -dumpversion 2>/dev/null)
WERROR ?= $(if $(filter 12,$(CXX_VERSION)),1,0)

# -ffp-contract=off: a product and a sum round twice unless the source says fma.
COMPILE := $(CXX) -std=c++20 -I. -Wall -Wextra -Wpedantic $(if $(filter 1,$(WERROR)),-Werror) -g -MMD -MP \
           $(if $(filter 1,$(DEBUG)),-O0,-O2) $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all) \
           $(CPPFLAGS) $(CXXFLAGS) -ffp-contract=off
LIBS    := -pthread $(if $(SANITIZE),-fsanitize=$(SANITIZE)) \
           $(if $(filter 1,$(CUDA)),-static-libstdc++ -static-libgcc -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt)
LINK     = @echo "  $@"; $(CXX) $(CXXFLAGS) -o $@ $^ $(LDFLAGS) $(LIBS)

# Files of one instruction set carry its name; nothing else is compiled with its flags.
FLAGS_avx2   := -mavx2 -mfma -mf16c
FLAGS_avxvnni := $(FLAGS_avx2) -mavxvnni
# (g++ 12 warns inside its own AVX-512 headers.)
FLAGS_avx512 := $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512 \
                -Wno-uninitialized -Wno-maybe-uninitialized
FLAGS_avx512bf16 := $(FLAGS_avx512) -mavx512bf16
FLAGS_amx    := $(FLAGS_avx512) -mamx-tile -mamx-int8 -mamx-bf16
FLAGS_neon   := -march=armv8.2-a+dotprod
# Those of other machines are left out (engine/cpu/other_machines.cc).
MACHINE  := $(firstword $(subst -, ,$(shell $(CXX) -dumpmachine 2>/dev/null)))
NOT_HERE := $(if $(filter x86_64,$(MACHINE)),,%_avx2.cc %_avxvnni.cc %_avx512.cc %_avx512bf16.cc %_amx.cc \
              %_amx_available.cc) $(if $(filter aarch64,$(MACHINE)),,%_neon.cc)

# -fmad=false: a product and a sum round twice unless the source says fma (cuda/contract.cuh).
NVCCFLAGS := -std=c++20 -I. -O3 --compress-mode=size -fmad=false --expt-relaxed-constexpr -diag-suppress 1046 --threads 0 \
             $(if $(filter 1,$(WERROR)),-Werror all-warnings) -Xptxas -warn-spills -Xcompiler -Wall,-Wextra -ccbin $(lastword $(CXX)) \
             -DCHIMERA_CUDA_ARCHS='"$(CUDA_ARCHS), PTX 90"' -gencode arch=compute_90,code=compute_90 \
             $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a))

LIBRARY := $(filter-out $(NOT_HERE),$(wildcard engine/*.cc engine/*/*.cc tokenizer/*.cc loader/*.cc)) \
           $(if $(filter 1,$(CUDA)),cuda/cuda_backend.cu,cuda/stub.cc)
PROGRAM := $(filter-out tools/hello.cc,$(wildcard tools/*.cc tools/bench/*.cc tools/train/*.cc))
LADDER  := $(wildcard tools/ladder/*.cc)
# The tests run the CUDA kernels on the CPU, on machines with a toolkit and without.
TESTS   := $(wildcard tests/*.cc) cuda/emulator.cc cuda/emulated_backend.cc

objects  = $(addprefix $(BUILD)/obj/,$(addsuffix .o,$(basename $(1))))
isa      = $(FLAGS_$(lastword $(subst _, ,$(basename $(notdir $(1))))))

.PHONY: all deps run test test-full bench bench-cuda ladder gpu-bundle install clean prepare
all: $(BUILD)/chimera

deps:
	@tools/install_deps.sh

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

test test-full: export CHIMERA_BUILD = $(BUILD)
test test-full: prepare
	@$(BUILD)/chimera_tests --gtest_brief=1 $(if $(filter test,$@),--gtest_filter='-*Full.*')
	@$(if $(HAS_GPU),$(BUILD)/gpu_tests --gtest_brief=1)

bench: prepare
	@$(BUILD)/chimera bench -m $(MODEL) $(DRAFT) $(BENCH_PROMPTS) $(ARGS)

ladder: deps
	$(if $(filter x86_64,$(MACHINE)),,$(error make ladder: expected an x86-64 machine, found $(MACHINE): its kernels are written for AVX2))
	@$(MAKE) -s --no-print-directory $(BUILD)/ladder
	@$(BUILD)/ladder

bench-cuda: $(BUILD)/bench_cuda $(BUILD)/chimera
	@$(BUILD)/bench_cuda
	@for type in bf16 q8_0 q4_0; do $(BUILD)/chimera bench --device cuda --shape llama-2-7b --type $$type || exit; done

# gpu_check.sh runs what lies beside it. The model is apart, in halves, to be laid beside it too.
gpu-bundle: $(addprefix $(BUILD)/gpu-bundle/,chimera gpu_tests bench_cuda)
	@cp tools/gpu_check.sh $(wildcard models/*.chimera.safetensors) $(BUILD)/gpu-bundle
	@[ ! -d ../shared/data/models/stories260K ] || { \
	  mkdir -p $(BUILD)/gpu-bundle/shared/data/models && cp -r ../shared/data/models/stories260K $(BUILD)/gpu-bundle/shared/data/models/; }
	@[ ! -f $(MODEL) ] || { mkdir -p $(BUILD)/gpu-model && split -b 56M -d -a 1 $(MODEL) $(BUILD)/gpu-model/model.gguf.; }
	@du -sh $(BUILD)/gpu-bundle $(wildcard $(BUILD)/gpu-model)

$(BUILD)/gpu-bundle/%: $(BUILD)/%
	@mkdir -p $(@D)
	@strip -o $@ $<

prepare: deps
	@tools/fetch_model.sh || echo "continuing without the model"
	@$(MAKE) -s --no-print-directory $(BUILD)/chimera $(if $(filter test%,$(MAKECMDGOALS)),$(BUILD)/chimera_tests $(if $(HAS_GPU),$(BUILD)/gpu_tests))

# All that decides how the sources are compiled: a change of it compiles them anew.
SETTINGS := $(strip $(CXX_VERSION) $(COMPILE) $(foreach f,$(sort $(filter FLAGS_%,$(.VARIABLES))),$($(f))) \
              $(LDFLAGS) $(LIBS) $(if $(filter 1,$(CUDA)),$(NVCC_FOUND) $(NVCCFLAGS)))
ifneq ($(SETTINGS),$(file <$(BUILD)/settings))
.PHONY: $(BUILD)/settings
endif
JSON_IS_HERE = $(shell $(CXX) $(CPPFLAGS) $(CXXFLAGS) -include nlohmann/json.hpp -E -x c++ /dev/null >/dev/null 2>&1 && echo 1)
$(BUILD)/settings: export SETTINGS := $(SETTINGS)
$(BUILD)/settings:
	$(if $(JSON_IS_HERE),,$(error expected $(CXX) and nlohmann/json.hpp, found not both; make deps installs them))
	@mkdir -p $(@D)
	@printf '%s\n' "$$SETTINGS" >$@

$(BUILD)/libchimera.a: $(call objects,$(LIBRARY))
	@rm -f $@
	@ar rcs $@ $^

$(BUILD)/chimera: $(call objects,$(PROGRAM)) $(BUILD)/libchimera.a
	$(LINK)

$(BUILD)/hello: $(call objects,tools/hello.cc) $(BUILD)/libchimera.a
	$(LINK)

# The tests run the program and the example.
$(BUILD)/chimera_tests: private LIBS += -lgtest_main -lgtest
$(BUILD)/chimera_tests: $(call objects,$(TESTS) $(filter-out tools/main.cc,$(PROGRAM))) $(BUILD)/libchimera.a | \
                        $(BUILD)/chimera $(BUILD)/hello
	$(LINK)

$(BUILD)/ladder: $(call objects,$(LADDER)) $(BUILD)/libchimera.a
	$(LINK)

# The tests of the kernels again, on the GPU.
GPU_TESTS := tests/cuda_linear_test.cc tests/cuda_kernels_test.cc tests/cuda_train_test.cc
$(BUILD)/gpu_tests: private LIBS += -lgtest_main -lgtest
$(BUILD)/gpu_tests: $(addprefix $(BUILD)/gpu-obj/,$(GPU_TESTS:.cc=.o)) \
                    $(call objects,tests/cuda_backend_test.cc tests/cuda_draft_test.cc tests/tiny_model.cc \
                      cuda/emulator.cc cuda/emulated_backend.cc) $(BUILD)/libchimera.a
	$(LINK)

$(BUILD)/bench_cuda: $(call objects,cuda/bench_cuda.cu) $(BUILD)/libchimera.a
	$(LINK)

$(BUILD)/gpu-obj/%.o: %.cc $(BUILD)/settings
	@mkdir -p $(@D)
	@echo "  $< for the GPU"
	@$(NVCC) -x cu $(NVCCFLAGS) -MD -MP -MF $(@:.o=.d) -c -o $@ $<

$(BUILD)/obj/%.o: %.cc $(BUILD)/settings
	@mkdir -p $(@D)
	@echo "  $<"
	@$(COMPILE) $(call isa,$<) -c -o $@ $<

$(BUILD)/obj/%.o: %.cu $(BUILD)/settings
	@mkdir -p $(@D)
	@echo "  $<"
	@$(NVCC) $(NVCCFLAGS) -MD -MP -MF $(@:.o=.d) -c -o $@ $<

# Headers include one another as they lie here: -I$(PREFIX)/include/chimera.
install: $(BUILD)/chimera
	install -D -t $(DESTDIR)$(PREFIX)/bin $(BUILD)/chimera
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib $(BUILD)/libchimera.a
	@for header in $(wildcard engine/*.h engine/*/*.h tokenizer/*.h loader/*.h); do \
	  install -D -m 644 $$header $(DESTDIR)$(PREFIX)/include/chimera/$$header || exit; done

clean:
	rm -rf $(if $(filter file,$(origin BUILD)),build build-*,$(BUILD))

-include $(patsubst %.o,%.d,$(call objects,$(LIBRARY) $(PROGRAM) $(LADDER) $(TESTS) tools/hello.cc cuda/bench_cuda.cu) \
           $(addprefix $(BUILD)/gpu-obj/,$(GPU_TESTS:.cc=.o)))

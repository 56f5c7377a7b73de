// Streams, events, capture and graphs. Work runs when it is submitted, so that streams only
// matter for what capture records.

#include <chrono>
#include <cstring>
#include <set>

#include "driver.h"

namespace emulator {

namespace {

enum CaptureMode : int { capture_global, capture_thread_local, capture_relaxed };
enum CaptureStatus : int { capture_none, capture_active, capture_invalidated };

struct Graph {
    std::vector<Operation> operations;
};

struct Stream;

struct Capture {
    Graph graph;
    CaptureMode mode;
    const void* thread;
    Stream* origin;
    unsigned long long id;
    bool invalidated = false;
};

struct Stream {
    unsigned flags;
    int priority;
    std::shared_ptr<Capture> capture;
};

struct Event {
    bool timed;
    bool recorded = false;
    std::chrono::steady_clock::time_point time;
    std::weak_ptr<Capture> capture;
};

constexpr unsigned event_disable_timing = 2;
constexpr unsigned stream_non_blocking = 1;

// The handles 0, 1 and 2 stand for the legacy and the per-thread default stream.
Stream default_stream, per_thread_stream;
std::set<Stream*> streams;
std::set<Event*> events;
std::set<Graph*> graphs, executables;
std::set<Capture*> captures;
unsigned long long captures_begun;
// Its address tells threads apart.
thread_local char this_thread;

Stream* find_stream(void* handle) {
    if ((uintptr_t)handle <= 1) return &default_stream;
    if ((uintptr_t)handle == 2) return &per_thread_stream;
    auto found = streams.find((Stream*)handle);
    return found == streams.end() ? nullptr : *found;
}

template <class T>
T* live(const std::set<T*>& all, void* handle) {
    auto found = all.find((T*)handle);
    return found == all.end() ? nullptr : *found;
}

template <class Body>
CUresult with_stream(void* handle, Body body) {
    return in_context([&] {
        Stream* stream = find_stream(handle);
        return stream ? body(*stream) : refuse(CUDA_ERROR_INVALID_HANDLE, "no such stream");
    });
}

template <class Body>
CUresult with_event(void* handle, Body body) {
    return in_context([&] {
        Event* event = live(events, handle);
        return event ? body(*event) : refuse(CUDA_ERROR_INVALID_HANDLE, "no such event");
    });
}

CUresult invalidate(Capture& capture) {
    capture.invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CaptureStatus status(const Stream& stream) {
    if (!stream.capture) return capture_none;
    return stream.capture->invalidated ? capture_invalidated : capture_active;
}

CUresult create_stream(void** out, unsigned flags, int priority) {
    return in_context([&] {
        if (!out) return CUDA_ERROR_INVALID_VALUE;
        *out = *streams.insert(new Stream{flags, priority, nullptr}).first;
        return CUDA_SUCCESS;
    });
}

CUresult instantiate(void** out, void* handle) {
    return in_context([&] {
        Graph* graph = live(graphs, handle);
        if (!out || !graph) return CUDA_ERROR_INVALID_VALUE;
        *out = *executables.insert(new Graph(*graph)).first;
        return CUDA_SUCCESS;
    });
}

CUresult record(void* event_handle, void* stream_handle) {
    return with_event(event_handle, [&](Event& event) {
        Stream* stream = find_stream(stream_handle);
        if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such stream");
        if (stream->capture) {
            event.capture = stream->capture;
        } else {
            event.capture.reset();
            event.recorded = true;
            event.time = std::chrono::steady_clock::now();
        }
        return CUDA_SUCCESS;
    });
}

CUresult elapsed(float* milliseconds, void* start, void* end) {
    return in_context([&] {
        Event *first = live(events, start), *last = live(events, end);
        if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
        if (!first || !last || !first->recorded || !last->recorded || !first->timed ||
            !last->timed) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        std::chrono::duration<float, std::milli> time = last->time - first->time;
        *milliseconds = time.count();
        return CUDA_SUCCESS;
    });
}

}  // namespace

CUresult submit(void* handle, Operation operation) {
    Stream* stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such stream");
    if (stream->capture) {
        if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        stream->capture->graph.operations.push_back(std::move(operation));
        return CUDA_SUCCESS;
    }
    for (Capture* capture : captures) {
        if (stream == &default_stream && !(capture->origin->flags & stream_non_blocking)) {
            capture->invalidated = true;
            return refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                          "the default stream was used while a blocking stream is captured");
        }
    }
    return operation.run();
}

CUresult check_capture_allows() {
    CUresult result = CUDA_SUCCESS;
    for (Capture* capture : captures) {
        bool disturbed = capture->mode == capture_global ||
                         (capture->mode == capture_thread_local && capture->thread == &this_thread);
        if (disturbed) result = invalidate(*capture);
    }
    return result ? refuse(result, "a call that may not happen during capture") : result;
}

}  // namespace emulator

using namespace emulator;

EMULATOR_API cuCtxSynchronize() {
    return in_context([&] {
        CUresult result = CUDA_SUCCESS;
        for (Capture* capture : captures) result = invalidate(*capture);
        return result;
    });
}

EMULATOR_API cuStreamCreate(void** stream, unsigned flags) {
    return create_stream(stream, flags, 0);
}

EMULATOR_API cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    return create_stream(stream, flags, priority);
}

EMULATOR_API cuStreamDestroy_v2(void* handle) {
    return in_context([&] {
        Stream* stream = live(streams, handle);
        if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such stream");
        if (stream->capture && stream->capture->origin == stream) {
            captures.erase(stream->capture.get());
        }
        streams.erase(stream);
        delete stream;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuStreamSynchronize(void* handle) {
    return with_stream(handle, [&](Stream& stream) {
        return stream.capture ? invalidate(*stream.capture) : CUDA_SUCCESS;
    });
}

EMULATOR_API cuStreamQuery(void* handle) { return cuStreamSynchronize(handle); }

EMULATOR_API cuStreamGetPriority(void* handle, int* priority) {
    return with_stream(handle, [&](Stream& stream) {
        *priority = stream.priority;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuStreamGetFlags(void* handle, unsigned* flags) {
    return with_stream(handle, [&](Stream& stream) {
        *flags = stream.flags;
        return CUDA_SUCCESS;
    });
}

// A stream that waits for an event of a capture joins it.
EMULATOR_API cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    return with_stream(handle, [&](Stream& stream) {
        Event* event = live(events, event_handle);
        if (!event) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such event");
        auto capture = event->capture.lock();
        if (!capture) return CUDA_SUCCESS;
        if (stream.capture && stream.capture != capture) return invalidate(*stream.capture);
        stream.capture = capture;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
    return in_context([&] {
        return submit(handle, {Operation::host, [=] {
                                   function(data);
                                   return CUDA_SUCCESS;
                               }});
    });
}

EMULATOR_API cuStreamBeginCapture_v2(void* handle, int mode) {
    return with_stream(handle, [&](Stream& stream) {
        if (stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
        if (&stream == &default_stream) {
            return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                          "the default stream cannot be captured");
        }
        stream.capture = std::make_shared<Capture>();
        stream.capture->mode = (CaptureMode)mode;
        stream.capture->thread = &this_thread;
        stream.capture->origin = &stream;
        stream.capture->id = ++captures_begun;
        captures.insert(stream.capture.get());
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuStreamEndCapture(void* handle, void** out) {
    return with_stream(handle, [&](Stream& stream) {
        if (!out) return CUDA_ERROR_INVALID_VALUE;
        *out = nullptr;
        auto capture = stream.capture;
        if (!capture) return CUDA_ERROR_ILLEGAL_STATE;
        if (capture->origin != &stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
        captures.erase(capture.get());
        stream.capture.reset();
        for (Stream* other : streams) {
            if (other->capture == capture) other->capture.reset();
        }
        if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        *out = *graphs.insert(new Graph(std::move(capture->graph))).first;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuStreamIsCapturing(void* handle, int* result) {
    return with_stream(handle, [&](Stream& stream) {
        *result = status(stream);
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuStreamGetCaptureInfo_v3(void* handle, int* result, unsigned long long* id, void**,
                                       const void**, const void**, size_t*) {
    return with_stream(handle, [&](Stream& stream) {
        *result = status(stream);
        if (id && stream.capture) *id = stream.capture->id;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuEventCreate(void** out, unsigned flags) {
    return in_context([&] {
        if (!out) return CUDA_ERROR_INVALID_VALUE;
        auto event = new Event;
        event->timed = !(flags & event_disable_timing);
        *out = *events.insert(event).first;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuEventDestroy_v2(void* handle) {
    return with_event(handle, [&](Event& event) {
        events.erase(&event);
        delete &event;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuEventRecord(void* event, void* stream) { return record(event, stream); }

EMULATOR_API cuEventRecordWithFlags(void* event, void* stream, unsigned) {
    return record(event, stream);
}

EMULATOR_API cuEventSynchronize(void* handle) {
    return with_event(handle, [&](Event& event) {
        return event.capture.expired() ? CUDA_SUCCESS : CUDA_ERROR_CAPTURED_EVENT;
    });
}

EMULATOR_API cuEventQuery(void* handle) { return cuEventSynchronize(handle); }

EMULATOR_API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return elapsed(milliseconds, start, end);
}

EMULATOR_API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    return elapsed(milliseconds, start, end);
}

EMULATOR_API cuGraphCreate(void** out, unsigned) {
    return in_context([&] {
        if (!out) return CUDA_ERROR_INVALID_VALUE;
        *out = *graphs.insert(new Graph).first;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuGraphDestroy(void* handle) {
    return in_context([&] {
        Graph* graph = live(graphs, handle);
        if (!graph) return CUDA_ERROR_INVALID_VALUE;
        graphs.erase(graph);
        delete graph;
        return CUDA_SUCCESS;
    });
}

// Only the number of nodes is emulated: nodes have no handles.
EMULATOR_API cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
    return in_context([&] {
        Graph* graph = live(graphs, handle);
        if (!graph || !count) return CUDA_ERROR_INVALID_VALUE;
        if (nodes) return CUDA_ERROR_NOT_SUPPORTED;
        *count = graph->operations.size();
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
    return instantiate(out, graph);
}

EMULATOR_API cuGraphInstantiateWithParams(void** out, void* graph, void*) {
    return instantiate(out, graph);
}

EMULATOR_API cuGraphExecUpdate_v2(void* executable_handle, void* graph_handle, int* result) {
    return in_context([&] {
        Graph* executable = live(executables, executable_handle);
        Graph* graph = live(graphs, graph_handle);
        if (!executable || !graph) return CUDA_ERROR_INVALID_VALUE;
        constexpr int topology_changed = 2;
        bool same = executable->operations.size() == graph->operations.size();
        for (size_t i = 0; same && i < graph->operations.size(); ++i) {
            same = executable->operations[i].kind == graph->operations[i].kind;
        }
        if (result) *result = same ? 0 : topology_changed;
        if (!same) return CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
        *executable = *graph;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuGraphUpload(void* executable, void*) {
    return in_context([&] {
        return live(executables, executable) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    });
}

EMULATOR_API cuGraphLaunch(void* handle, void* stream) {
    return in_context([&] {
        Graph* executable = live(executables, handle);
        if (!executable) return CUDA_ERROR_INVALID_VALUE;
        for (const Operation& operation : executable->operations) {
            if (CUresult error = submit(stream, operation)) return error;
        }
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuGraphExecDestroy(void* handle) {
    return in_context([&] {
        Graph* executable = live(executables, handle);
        if (!executable) return CUDA_ERROR_INVALID_VALUE;
        executables.erase(executable);
        delete executable;
        return CUDA_SUCCESS;
    });
}

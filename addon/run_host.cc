#include "run_host.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <system_error>
#include <unistd.h>

#include "environment.h"

namespace tsvisor {

namespace {

constexpr uint32_t kReady = 0x40000000;
constexpr uint32_t kMaxToken = 0xffff;
constexpr uint32_t kVcpu = 0x80000000;  // of what is posted: the index of a vCPU that has an exit
constexpr uint32_t kRing = 0x40000000;  // and of a ring
constexpr uint32_t kMaxRings = 1 << 20;
constexpr int32_t kReasonBits = 8;
// Nanoseconds: some exits, since the vCPU may be in the middle of one, the notification.
constexpr int64_t kLongestTry = 240'000;
constexpr size_t kMaxVcpus = 1 << 20;
constexpr uint64_t kWakeToken = UINT64_MAX;

}  // namespace

void RunHost::Init(Napi::Env env, Napi::Object exports) {
  Napi::Function constructor = DefineClass(
      env, "RunHost",
      {InstanceMethod<&RunHost::AttachVcpu>("attachVcpu"), InstanceMethod<&RunHost::DetachVcpu>("detachVcpu"),
       InstanceMethod<&RunHost::SetRunnable>("setRunnable"), InstanceMethod<&RunHost::Failure>("failure"),
       InstanceMethod<&RunHost::PollTable>("poll"), InstanceMethod<&RunHost::AttachRing>("attachRing"),
       InstanceMethod<&RunHost::DetachRing>("detachRing"), InstanceMethod<&RunHost::Watch>("watch"),
       InstanceMethod<&RunHost::Unwatch>("unwatch"),
       InstanceMethod<&RunHost::Settle>("settle"), InstanceMethod<&RunHost::Close>("close")});
  exports.Set("RunHost", constructor);
}

RunHost::RunHost(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RunHost>(info) {
  Napi::Env env = info.Env();
  if (KickSignal() == 0) throw Napi::Error::New(env, "no free real-time signal to interrupt a vCPU with");
  UnblockKickSignal();

  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeToken;
  if (epoll_ < 0 || wake_ < 0 || epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event) != 0) {
    std::string reason = strerror(errno);
    Stop();
    throw Napi::Error::New(env, "epoll: " + reason);
  }
  poller_ = std::thread([this] { Poll(); });

  // A raw function bound to this object: the wrapper's argument and exception handling costs 4 to 10 % of an exit.
  napi_value next;
  napi_create_function(env, "next", NAPI_AUTO_LENGTH, Next, this, &next);
  info.This().As<Napi::Object>().Set("next", next);
}

RunHost::~RunHost() { Stop(); }

void RunHost::Stop() {
  {
    std::lock_guard<std::mutex> lock(inbox_->mutex);
    inbox_->vcpus.clear();
    inbox_->inlined.reset();
  }
  for (auto& vcpu : vcpus_)
    if (vcpu) vcpu->BeginStop();
  vcpus_.clear();
  inlined_ = told_ = nullptr;
  rings_.clear();
  table_ = nullptr;
  if (poller_.joinable()) {
    uint64_t one = 1;
    while (write(wake_, &one, sizeof one) < 0 && errno == EINTR) {
    }
    poller_.join();
  }
  if (epoll_ >= 0) close(epoll_);
  if (wake_ >= 0) close(wake_);
  epoll_ = wake_ = -1;
}

void RunHost::Close(const Napi::CallbackInfo&) { Stop(); }

Napi::Value RunHost::AttachVcpu(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const int fd = info[0].As<Napi::Number>().Int32Value();
  std::shared_ptr<Pages> pages = Mapping::Unwrap(info[1].As<Napi::Object>())->pages();
  if (!pages || pages->length < sizeof(kvm_run)) throw Napi::TypeError::New(env, "not a kvm_run mapping");
  const bool own = info[2].As<Napi::Boolean>().Value();
  if (epoll_ < 0) throw Napi::Error::New(env, "the RunHost is closed");
  if (inlined_ != nullptr) throw Napi::TypeError::New(env, "an inline vCPU is the only one");

  size_t index = 0;
  while (index < vcpus_.size() && vcpus_[index]) index++;
  if (index == kMaxVcpus) throw Napi::RangeError::New(env, "too many vCPUs");
  std::shared_ptr<Vcpu> vcpu;
  if (own) {
    Inbox* inbox = inbox_.get();  // outlives the thread: Stop() ends that
    const uint32_t event = kVcpu | static_cast<uint32_t>(index);
    try {
      vcpu = std::make_shared<Vcpu>(fd, pages, inbox->halted, [inbox, event] { inbox->Post(&event, 1); });
    } catch (const std::system_error& error) {
      throw Napi::Error::New(env, std::string("no thread for a vCPU: ") + error.what());
    }
  } else {
    for (auto& other : vcpus_)
      if (other) throw Napi::TypeError::New(env, "an inline vCPU is the only one");
    vcpu = std::make_shared<Vcpu>(fd, pages);
    inlined_ = vcpu.get();
    inlinedIndex_ = static_cast<int32_t>(index);
  }
  if (index == vcpus_.size()) vcpus_.emplace_back();
  vcpus_[index] = vcpu;
  std::lock_guard<std::mutex> lock(inbox_->mutex);
  inbox_->vcpus = vcpus_;
  if (!own) inbox_->inlined = vcpu;
  return Napi::Number::New(env, static_cast<double>(index));
}

Vcpu* RunHost::At(const Napi::Value& index) {
  const uint32_t i = index.As<Napi::Number>().Uint32Value();
  return i < vcpus_.size() ? vcpus_[i].get() : nullptr;
}

void RunHost::DetachVcpu(const Napi::CallbackInfo& info) {
  Vcpu* vcpu = At(info[0]);
  if (vcpu == nullptr) return;
  if (vcpu == inlined_) inlined_ = nullptr;
  if (vcpu == told_) told_ = nullptr;
  std::shared_ptr<Vcpu> last = std::move(vcpus_[info[0].As<Napi::Number>().Uint32Value()]);  // its thread ends with it
  std::lock_guard<std::mutex> lock(inbox_->mutex);
  inbox_->vcpus = vcpus_;
  if (!inlined_) inbox_->inlined.reset();
}

void RunHost::SetRunnable(const Napi::CallbackInfo& info) {
  Napi::Array indices = info[0].As<Napi::Array>();
  const bool on = info[1].As<Napi::Boolean>().Value();
  std::vector<Vcpu*> own;
  for (uint32_t i = 0; i < indices.Length(); i++) {
    Vcpu* vcpu = At(indices.Get(i));
    if (vcpu == nullptr) continue;
    vcpu->runnable = on;
    if (!vcpu->inlined()) own.push_back(vcpu);
  }
  if (!on) {
    for (Vcpu* vcpu : own) vcpu->BeginStop();
    for (Vcpu* vcpu : own) vcpu->AwaitOwner();
    return;
  }
  for (Vcpu* vcpu : own) {
    if (vcpu->running() || vcpu == told_) continue;
    if (!vcpu->hasExit()) {
      vcpu->Go();
    } else if (vcpu->deferred) {
      vcpu->deferred = false;
      for (size_t i = 0; i < vcpus_.size(); i++) {
        const uint32_t event = kVcpu | static_cast<uint32_t>(i);
        if (vcpus_[i].get() == vcpu) inbox_->Post(&event, 1);
      }
    }
  }
}

Napi::Value RunHost::Failure(const Napi::CallbackInfo& info) {
  Vcpu* vcpu = At(info[0]);
  return Napi::Number::New(info.Env(), vcpu == nullptr ? EBADF : vcpu->error);
}

Napi::Value RunHost::Settle(const Napi::CallbackInfo& info) {
  Vcpu* vcpu = At(info[0]);
  int32_t value = -EBADF;
  if (vcpu != nullptr && !vcpu->running()) {
    if (vcpu == told_) told_ = nullptr;
    value = vcpu->Settle();
  }
  if (inbox_->halted.load()) value = -ECANCELED;
  return Napi::Number::New(info.Env(), value);
}

void RunHost::PollTable(const Napi::CallbackInfo& info) {
  Napi::Int32Array table = info[0].As<Napi::Int32Array>();
  if (table.ElementLength() == 0) throw Napi::TypeError::New(info.Env(), "poll: an empty table");
  tableHold_ = Napi::Persistent(table);
  table_ = table.Data();
  tableLength_ = static_cast<int32_t>(std::min<size_t>(table.ElementLength(), INT32_MAX));
}

Napi::Value RunHost::AttachRing(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::shared_ptr<Pages> pages = Mapping::Unwrap(info[0].As<Napi::Object>())->pages();
  const int64_t offset = info[1].As<Napi::Number>().Int64Value();
  const int64_t length = pages ? static_cast<int64_t>(pages->length) : 0;
  if (offset < 0 || offset % 2 != 0 || offset > length - 2) throw Napi::TypeError::New(env, "no ring of the mapping");
  auto ring = std::make_shared<Ring>();
  ring->index = reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(pages->address) + offset);
  ring->pages = std::move(pages);
  ring->token = static_cast<int32_t>(info[2].As<Napi::Number>().Uint32Value() & kMaxToken);
  auto place = std::find(rings_.begin(), rings_.end(), nullptr);
  if (place == rings_.end()) place = rings_.emplace(place);
  const auto index = static_cast<uint32_t>(place - rings_.begin());
  if (index == kMaxRings) throw Napi::RangeError::New(env, "too many rings");
  Napi::Array indices = info[3].As<Napi::Array>();
  const auto gpa = static_cast<uint64_t>(info[4].As<Napi::Number>().Int64Value());
  const uint32_t value = info[5].As<Napi::Number>().Uint32Value();
  Inbox* inbox = inbox_.get();  // outlives the vCPUs' threads
  const uint32_t event = kRing | index;
  for (uint32_t i = 0; i < indices.Length(); i++) {
    Vcpu* vcpu = At(indices.Get(i));
    if (vcpu == nullptr) continue;
    ring->vcpus.push_back(vcpus_[indices.Get(i).As<Napi::Number>().Uint32Value()]);
    vcpu->AddDoorbell({gpa, value, ring.get(), [inbox, event, r = ring.get()] {
                         if (!r->rung.exchange(true)) inbox->Post(&event, 1);
                       }});
  }
  *place = std::move(ring);
  return Napi::Number::New(env, index);
}

void RunHost::DetachRing(const Napi::CallbackInfo& info) {
  const uint32_t index = info[0].As<Napi::Number>().Uint32Value();
  if (index >= rings_.size() || !rings_[index]) return;
  std::shared_ptr<Ring> ring = std::move(rings_[index]);
  for (auto& weak : ring->vcpus) {
    if (auto vcpu = weak.lock()) vcpu->RemoveDoorbells(ring.get());
  }
}

int32_t RunHost::MovedRing() {
  if (!polls() || inbox_->halted.load()) return -1;
  const int32_t end = std::min(table_[0], (tableLength_ - 1) / 2);
  for (int32_t i = 0; i < end; i++) {
    const auto index = static_cast<uint32_t>(table_[1 + 2 * i]);
    int32_t& seen = table_[2 + 2 * i];
    if (seen < 0 || index >= rings_.size() || !rings_[index]) continue;
    if (__atomic_load_n(rings_[index]->index, __ATOMIC_ACQUIRE) == seen) continue;
    seen = -1;
    return rings_[index]->token;
  }
  return -1;
}

void RunHost::StepAside() const {
  const auto index = static_cast<uint32_t>(table_[1]);
  if (index >= rings_.size() || !rings_[index]) return;
  const auto& vcpus = rings_[index]->vcpus;
  const int here = sched_getcpu();
  const auto isHere = [here](const std::weak_ptr<Vcpu>& weak) {
    auto vcpu = weak.lock();
    return vcpu && vcpu->processor() == here;
  };
  if (std::none_of(vcpus.begin(), vcpus.end(), isHere)) return;
  cpu_set_t allowed, others;
  if (here < 0 || here >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  others = allowed;
  CPU_CLR(here, &others);
  if (static_cast<size_t>(CPU_COUNT(&others)) < vcpus.size()) return;  // there is nowhere to go
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}

Napi::Value RunHost::Watch(const Napi::CallbackInfo& info) {
  int fd = info[0].As<Napi::Number>().Int32Value();
  epoll_event event{};
  event.data.u64 = info[1].As<Napi::Number>().Uint32Value() & kMaxToken;
  event.events = info[2].As<Napi::Number>().Uint32Value() | EPOLLONESHOT;
  int result = epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event);
  if (result != 0 && errno == ENOENT) result = epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
  return Napi::Number::New(info.Env(), result == 0 ? 0 : -errno);
}

Napi::Value RunHost::Unwatch(const Napi::CallbackInfo& info) {
  int result = epoll_ctl(epoll_, EPOLL_CTL_DEL, info[0].As<Napi::Number>().Int32Value(), nullptr);
  return Napi::Number::New(info.Env(), result == 0 ? 0 : -errno);
}

void RunHost::Poll() {
  // Signals of the process are for its other threads.
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "tsvisor-poller");
  epoll_event events[16];
  uint32_t tokens[16];
  for (;;) {
    int count = epoll_wait(epoll_, events, 16, -1);
    if (count < 0 && errno != EINTR) return;
    size_t ready = 0;
    for (int i = 0; i < count; i++) {
      if (events[i].data.u64 == kWakeToken) return;
      tokens[ready++] = static_cast<uint32_t>(events[i].data.u64);
    }
    if (ready > 0) inbox_->Post(tokens, ready);
  }
}

void RunHost::Inbox::Post(const uint32_t* events, size_t count) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    ready.insert(ready.end(), events, events + count);
    pending.store(true);
    if (inlined) inlined->Kick();
  }
  posted.fetch_add(1);
  waiter.Wake(posted);
}

void RunHost::Inbox::Halt(uint32_t token) {
  halted.store(true);
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& vcpu : vcpus)
      if (vcpu) vcpu->Kick();
  }
  Post(&token, 1);
}

int32_t RunHost::Next(bool wait) {
  Inbox& inbox = *inbox_;
  if (epoll_ < 0) return -EBADF;
  if (told_ != nullptr) {
    Vcpu* vcpu = told_;
    told_ = nullptr;
    if (vcpu->runnable) vcpu->Go();
  }
  for (;;) {
    const uint32_t posted = inbox.posted.load();
    int32_t ring = ringsFirst_ ? MovedRing() : -1;
    ringsFirst_ = false;
    if (ring < 0 && inbox.pending.load()) {
      ringsFirst_ = true;
      spun_ = false;
      std::lock_guard<std::mutex> lock(inbox.mutex);
      while (!inbox.ready.empty()) {
        const uint32_t event = inbox.ready.front();
        inbox.ready.pop_front();
        if (inbox.ready.empty()) inbox.pending.store(false);
        if ((event & kRing) != 0) {
          Ring* rung = (event & ~kRing) < rings_.size() ? rings_[event & ~kRing].get() : nullptr;
          if (rung == nullptr || inbox.halted.load()) continue;
          rung->rung.store(false);
          return static_cast<int32_t>(kReady) | rung->token;
        }
        if ((event & kVcpu) == 0) return static_cast<int32_t>(kReady | event);
        const uint32_t index = event & ~kVcpu;
        Vcpu* vcpu = index < vcpus_.size() ? vcpus_[index].get() : nullptr;
        // Taken by settle() meanwhile, or another vCPU's by now.
        if (vcpu == nullptr || vcpu->inlined() || vcpu->running() || !vcpu->hasExit() || vcpu->deferred) continue;
        if (inbox.halted.load()) continue;
        if (!vcpu->runnable) {
          vcpu->deferred = true;
          continue;
        }
        told_ = vcpu;
        return static_cast<int32_t>(index) << kReasonBits | vcpu->TakeExit();
      }
    }
    if (ring < 0) ring = MovedRing();
    if (ring >= 0) return static_cast<int32_t>(kReady) | ring;
    if (!wait) return -EAGAIN;
    if (inlined_ != nullptr && inlined_->runnable && !inbox.halted.load()) {
      const int32_t exit = inlined_->Enter([&inbox] { return inbox.pending.load(); });
      if (exit >= 0 && !inbox.halted.load()) return inlinedIndex_ << kReasonBits | exit;
      continue;
    }
    if (!spun_ || polls()) {
      const auto moved = [&] { return (ring = MovedRing()) >= 0; };
      const bool tries = polls() && tries_.Take();
      if (tries) StepAside();
      const bool yields = inbox.working.load() > 0;
      const bool over = inbox.waiter.SpinWhile(inbox.posted, posted, moved, tries ? kLongestTry : 0, yields);
      if (ring >= 0) {
        tries_.Paid();
        return static_cast<int32_t>(kReady) | ring;
      }
      if (tries) tries_.InVain();
      if (over) continue;
      spun_ = polls();
      if (spun_) return -EAGAIN;
    }
    spun_ = false;
    inbox.waiter.SleepWhile(inbox.posted, posted);
  }
}

napi_value RunHost::Next(napi_env env, napi_callback_info info) {
  void* self;
  size_t count = 1;
  napi_value argument;
  napi_get_cb_info(env, info, &count, &argument, nullptr, &self);
  bool wait = true;
  if (count > 0) napi_get_value_bool(env, argument, &wait);
  napi_value result;
  napi_create_int32(env, static_cast<RunHost*>(self)->Next(wait), &result);
  return result;
}

}  // namespace tsvisor

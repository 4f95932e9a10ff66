#include "guest_io.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <sys/syscall.h>
#include <system_error>
#include <unistd.h>
#include <unordered_set>

#include "syscalls.h"

namespace tsvisor {

namespace {

// Enough to keep a disk's queue busy; made one by one as operations wait.
constexpr size_t kMaxThreads = 8;

// Bytes of writes that go together: what a reset has to wait for.
constexpr off_t kMaxRun = 1 << 20;

// The token of what has no completion of its own.
constexpr double kNobody = -1;

// Places in the order of a transfer, as in src/backends/transfer-order.ts: as arguments they would take longer than a quick
// system call.
enum Order : size_t { kOperation, kFd, kOffset, kFlags, kCount, kPrefixLength, kPrefix, kPairs = kPrefix + 8 };
constexpr double kMaxPrefix = (kPairs - kPrefix) * sizeof(double);

// Of an offset or a length in bytes: a double is exact so far.
constexpr double kMaxOffset = 9e15;

napi_value Number(napi_env env, int64_t value) {
  napi_value result;
  napi_create_int64(env, value, &result);
  return result;
}

napi_value Throw(napi_env env, const char* message) {
  napi_throw_type_error(env, nullptr, message);
  return nullptr;
}

// The arguments of a raw function, read by type.
class Arguments {
 public:
  Arguments(napi_env env, napi_callback_info info) : env_(env) {
    napi_get_cb_info(env, info, &count, values_, nullptr, &self);
  }
  bool Double(size_t i, double* value) const {
    return i < count && napi_get_value_double(env_, values_[i], value) == napi_ok;
  }
  // An offset or a length in bytes.
  bool Offset(size_t i, off_t* value) const {
    double number;
    if (!Double(i, &number) || !(number >= 0 && number < kMaxOffset)) return false;
    *value = static_cast<off_t>(number);
    return true;
  }
  bool Int(size_t i, int32_t* value) const {
    return i < count && napi_get_value_int32(env_, values_[i], value) == napi_ok;
  }
  bool Uint(size_t i, uint32_t* value) const {
    return i < count && napi_get_value_uint32(env_, values_[i], value) == napi_ok;
  }
  // A Float64Array with at least `pairs` pairs.
  bool Pairs(size_t i, uint32_t pairs, const double** data) const {
    uint8_t* bytes;
    size_t length;
    if (i >= count || !BytesOf(env_, values_[i], &bytes, &length) || length / sizeof(double) / 2 < pairs) return false;
    *data = reinterpret_cast<const double*>(bytes);
    return true;
  }
  bool Bytes(size_t i, uint8_t** bytes, size_t* length) const {
    return i < count && BytesOf(env_, values_[i], bytes, length);
  }
  size_t count = 8;
  void* self = nullptr;

 private:
  napi_env env_;
  napi_value values_[8];
};

// All of a read or write, as far as the file goes.
int64_t MoveAll(bool isWrite, int fd, off_t offset, std::vector<iovec>& iov) {
  int64_t done = 0;
  for (size_t first = 0; first < iov.size();) {
    int count = static_cast<int>(std::min<size_t>(iov.size() - first, IOV_MAX));
    ssize_t n = isWrite ? pwritev(fd, &iov[first], count, offset + done) : preadv(fd, &iov[first], count, offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -errno;
    if (n == 0) break;
    done += n;
    for (size_t left = n; left > 0;) {
      size_t part = std::min(left, iov[first].iov_len);
      iov[first].iov_base = static_cast<uint8_t*>(iov[first].iov_base) + part;
      iov[first].iov_len -= part;
      left -= part;
      if (iov[first].iov_len == 0) first++;
    }
  }
  return done;
}

int Allocate(int fd, int mode, off_t offset, off_t length) {
  int result;
  do result = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, length);
  while (result != 0 && errno == EINTR);
  if (result == 0) return 0;
  return errno == ENOSYS ? -EOPNOTSUPP : -errno;
}

int64_t WriteZeroes(int fd, off_t offset, off_t length) {
  static const std::vector<uint8_t> zeroes(1 << 16);
  for (off_t done = 0; done < length;) {
    ssize_t n = pwrite(fd, zeroes.data(), std::min<off_t>(length - done, zeroes.size()), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? -errno : -EIO;
    done += n;
  }
  return 0;
}

int64_t ZeroRange(int fd, off_t offset, off_t length) {
  for (int mode : {FALLOC_FL_ZERO_RANGE, FALLOC_FL_PUNCH_HOLE}) {
    int result = Allocate(fd, mode, offset, length);
    if (result != -EOPNOTSUPP) return result;
  }
  return WriteZeroes(fd, offset, length);
}

int64_t Copy(int from, off_t fromOffset, int to, off_t offset, off_t length) {
  std::vector<uint8_t> buffer(std::min<off_t>(length, 1 << 16));
  for (off_t done = 0; done < length;) {
    ssize_t n = pread(from, buffer.data(), std::min<off_t>(length - done, buffer.size()), fromOffset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? -errno : done;
    std::vector<iovec> iov{{buffer.data(), static_cast<size_t>(n)}};
    int64_t written = MoveAll(true, to, offset + done, iov);
    if (written < 0) return written;
    done += written;
  }
  return length;
}

}  // namespace

void GuestIo::Init(Napi::Env env, Napi::Object exports) {
  exports.Set("GuestIo", DefineClass(env, "GuestIo",
                                     {InstanceMethod<&GuestIo::Close>("close")}));
}

GuestIo::GuestIo(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<GuestIo>(info),
      inbox_(RunHost::Unwrap(info[1].As<Napi::Object>())->inbox()),
      ready_(info[2].As<Napi::Number>().Uint32Value() & 0xffff) {
  Napi::Env env = info.Env();
  auto regions = info[0].As<Napi::Array>();
  for (uint32_t i = 0; i < regions.Length(); i++) {
    auto pair = regions.Get(i).As<Napi::Array>();
    std::shared_ptr<Pages> pages = Mapping::Unwrap(pair.Get(1u).As<Napi::Object>())->pages();
    if (!pages) throw Napi::TypeError::New(env, "an unmapped region");
    regions_.push_back({static_cast<uint64_t>(pair.Get(0u).As<Napi::Number>().Int64Value()), pages});
  }
  auto order = info[3].As<Napi::Float64Array>();
  if (order.ElementLength() < kPairs) throw Napi::TypeError::New(env, "the order of a transfer is longer");
  orderHold_ = Napi::Persistent(order);
  order_ = order.Data();
  orderLength_ = order.ElementLength();
  auto self = info.This().As<Napi::Object>();
  // Raw functions bound to this object: they are called for every request.
  for (auto [name, callback] : {std::pair{"transfer", Transfer}, {"submit", Submit}, {"completions", Completions}, {"cancel", Cancel}}) {
    napi_value function;
    napi_create_function(env, name, NAPI_AUTO_LENGTH, callback, this, &function);
    self.Set(name, function);
  }
}

GuestIo::~GuestIo() { Stop(); }

void GuestIo::Close(const Napi::CallbackInfo&) { Stop(); }

void GuestIo::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    queue_.clear();
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  writes_.clear();
  inbox_->working.fetch_sub(working_);
  working_ = 0;
  regions_.clear();
  completions_.clear();
}

bool GuestIo::Translate(const double* pairs, size_t count, std::vector<iovec>* iov) const {
  for (size_t i = 0; i < count; i++) {
    double address = pairs[2 * i], size = pairs[2 * i + 1];
    if (!(address >= 0 && address < kMaxOffset && size >= 0 && size < kMaxOffset)) return false;
    auto gpa = static_cast<uint64_t>(address);
    auto left = static_cast<uint64_t>(size);
    while (left > 0) {  // A range may go on in the next region.
      auto region = std::find_if(regions_.begin(), regions_.end(), [gpa](const Region& r) {
        return gpa >= r.gpa && gpa - r.gpa < r.pages->length;
      });
      if (region == regions_.end()) return false;
      uint64_t at = gpa - region->gpa;
      uint64_t part = std::min<uint64_t>(left, region->pages->length - at);
      iov->push_back({static_cast<uint8_t*>(region->pages->address) + at, part});
      gpa += part;
      left -= part;
    }
  }
  return true;
}

bool GuestIo::Present(const std::vector<iovec>& iov) const {
  for (const Region& region : regions_) {
    const Pages& pages = *region.pages;
    if (!pages.paged) continue;
    auto start = reinterpret_cast<uintptr_t>(pages.address);
    for (const iovec& part : iov) {
      auto at = reinterpret_cast<uintptr_t>(part.iov_base);
      if (at < start || at - start >= pages.length) continue;
      for (uintptr_t page = at & ~(kPage - 1); page < at + part.iov_len; page += kPage) {
        static_cast<void>(*reinterpret_cast<const volatile uint8_t*>(page));
      }
    }
  }
  return std::none_of(regions_.begin(), regions_.end(), [](const Region& region) { return region.pages->lost.load(); });
}

napi_value GuestIo::Transfer(napi_env env, napi_callback_info info) {
  void* data;
  size_t none = 0;
  napi_get_cb_info(env, info, &none, nullptr, nullptr, &data);
  auto* self = static_cast<GuestIo*>(data);
  double* order = self->order_;
  const bool isWrite = order[kOperation] == kWrite;
  const double prefix = order[kPrefixLength], count = order[kCount], offset = order[kOffset];
  if (!(isWrite || order[kOperation] == kRead) || !(order[kFd] >= -1 && order[kFd] <= INT_MAX) ||
      !(order[kFlags] >= 0 && order[kFlags] <= INT_MAX) || !(offset < kMaxOffset) ||
      !(prefix >= 0 && prefix <= kMaxPrefix) || (prefix > 0 && !isWrite) || !(count >= 0 && kPairs + 2 * count <= static_cast<double>(self->orderLength_)))
    return Throw(env, "transfer: the order is none");
  const int fd = static_cast<int>(order[kFd]), flags = static_cast<int>(order[kFlags]);
  std::vector<iovec>& iov = self->scratch_;
  iov.clear();
  if (prefix > 0) iov.push_back({&order[kPrefix], static_cast<size_t>(prefix)});
  if (!self->Translate(&order[kPairs], static_cast<size_t>(count), &iov)) return Number(env, -EFAULT);
  if (isWrite && !self->Present(iov)) return Number(env, -EIO);
  const size_t parts = std::min<size_t>(iov.size(), IOV_MAX);
  const off_t at = offset < 0 ? -1 : static_cast<off_t>(offset);
  // Not by libc's functions, which see to the cancellation of threads around them.
  const long number = isWrite ? SYS_pwritev2 : SYS_preadv2;
  long n;
  do n = syscall(number, fd, iov.data(), parts, at, 0L, flags);
  while (n < 0 && errno == EINTR);
  return Number(env, n < 0 ? -errno : n);
}

napi_value GuestIo::Submit(napi_env env, napi_callback_info info) {
  Arguments arguments(env, info);
  auto* self = static_cast<GuestIo*>(arguments.self);
  Job job;
  uint32_t operation, count;
  const double* pairs;
  if (!arguments.Double(0, &job.token) || !arguments.Uint(1, &operation) || operation >= kOperations ||
      !arguments.Int(2, &job.fd) || !arguments.Offset(3, &job.offset) || !arguments.Offset(4, &job.length) ||
      !arguments.Uint(6, &count) || !arguments.Pairs(5, count, &pairs))
    return Throw(env, "submit(token, operation, fd, offset, length, pairs, count, bytes?)");
  job.operation = static_cast<Operation>(operation);
  if (job.operation == kCopy) {
    if (count != 1 || !(pairs[0] >= 0 && pairs[0] <= INT_MAX && pairs[1] >= 0 && pairs[1] < kMaxOffset))
      return Throw(env, "submit: copy takes one pair (descriptor, offset)");
    job.from = static_cast<int>(pairs[0]);
    job.fromOffset = static_cast<off_t>(pairs[1]);
  } else if (arguments.count > 7) {
    uint8_t* bytes;
    size_t size;
    if (job.operation != kWrite || count != 0 || !arguments.Bytes(7, &bytes, &size))
      return Throw(env, "submit: bytes are for a write, in place of pairs");
    job.bytes.assign(bytes, bytes + size);
    job.iov.push_back({job.bytes.data(), size});
  } else if (!self->Translate(pairs, count, &job.iov)) {
    return Number(env, -EFAULT);
  }
  {
    std::lock_guard<std::mutex> lock(self->mutex_);
    if (self->stopping_) return Number(env, -EBADF);
    self->working_++;
    self->inbox_->working.fetch_add(1);
    Job next = std::move(job);
    if (next.operation == kWrite) {
      next.length = 0;
      for (const iovec& part : next.iov) next.length += static_cast<off_t>(part.iov_len);
      Job turn{kNobody, kWrite, next.fd, 0, 0, {}, {}};
      auto [writes, first] = self->writes_.try_emplace(next.fd);
      writes->second.push_back(std::move(next));
      if (!first) return Number(env, 0);  // Who writes that file goes on with it.
      next = std::move(turn);
    }
    self->queue_.push_back(std::move(next));
    self->submitted_.fetch_add(1);
    const size_t ready = self->idle_ + (self->spins_ ? 1 : 0);
    if (self->spins_ && self->queue_.size() == 1) return Number(env, 0);  // Who spins sees it.
    if (ready < self->queue_.size() && self->threads_.size() < kMaxThreads) self->AddThread();
  }
  self->work_.notify_one();
  return Number(env, 0);
}

void GuestIo::AddThread() {
  try {
    threads_.emplace_back([this] { Work(); });
  } catch (const std::system_error& error) {  // The host has no more threads: fewer do, none does not.
    if (!threads_.empty()) return;
    Job& job = queue_.back();
    if (job.operation == kWrite) {
      auto writes = writes_.extract(job.fd);
      for (Job& write : writes.mapped()) Complete(write.token, -error.code().value());
    } else {
      Complete(job.token, -error.code().value());
    }
    queue_.pop_back();
  }
}

void GuestIo::Work() {
  // Signals of the process are for its other threads.
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "tsvisor-io");
  std::unique_lock<std::mutex> lock(mutex_);
  Spinner spinner;
  for (;;) {
    Await(&lock, &spinner);
    if (stopping_) return;
    Job job = std::move(queue_.front());
    queue_.pop_front();
    if (job.operation == kWrite) {
      WriteSome(job.fd, &lock);
      continue;
    }
    lock.unlock();
    int64_t result = Do(&job);
    lock.lock();
    Complete(job.token, result);
  }
}

// Returns when there is something to do, or nothing any more. One thread that spins is enough.
void GuestIo::Await(std::unique_lock<std::mutex>* lock, Spinner* spinner) {
  const auto over = [this] { return stopping_ || !queue_.empty(); };
  while (!over()) {
    const bool spins = !spins_;
    if (spins) {
      spins_ = true;
      const uint32_t seen = submitted_.load();
      lock->unlock();
      const bool soon = spinner->Spin([&] { return submitted_.load() != seen; }, 0, true);
      lock->lock();
      spins_ = false;
      if (soon) continue;  // Unless another one was sooner.
    }
    idle_++;
    work_.wait(*lock, over);
    idle_--;
    if (spins) spinner->Slept();
  }
}

// Writes what waits for a file, as far as it goes together, and lets the rest wait for its next turn. The copies into the
// page cache of one file exclude one another anyway: a thread that waited for another's would only take a processor.
void GuestIo::WriteSome(int fd, std::unique_lock<std::mutex>* lock) {
  std::deque<Job>& waiting = writes_[fd];
  std::vector<Job> run;
  std::vector<iovec> together;
  off_t length = 0;
  while (!waiting.empty()) {
    const Job& next = waiting.front();
    if (!run.empty() && (next.offset != run.front().offset + length || length + next.length > kMaxRun ||
                         together.size() + next.iov.size() > IOV_MAX))
      break;
    together.insert(together.end(), next.iov.begin(), next.iov.end());
    length += next.length;
    run.push_back(std::move(waiting.front()));
    waiting.pop_front();
  }
  lock->unlock();
  std::vector<int64_t> results;
  bool done = run.size() > 1 && Present(together) && MoveAll(true, fd, run.front().offset, together) == length;
  // Where they fail together each has its own result.
  for (Job& job : run) results.push_back(done ? job.length : Do(&job));
  lock->lock();
  for (size_t i = 0; i < run.size(); i++) Complete(run[i].token, results[i]);
  if (waiting.empty()) writes_.erase(fd);
  else queue_.push_back({kNobody, kWrite, fd, 0, 0, {}, {}});
}

int64_t GuestIo::Do(Job* job) const {
  switch (job->operation) {
    case kRead:
      return MoveAll(false, job->fd, job->offset, job->iov);
    case kWrite:
    case kDirectWrite:
      return Present(job->iov) ? MoveAll(true, job->fd, job->offset, job->iov) : -EIO;
    case kFlush:
      return fdatasync(job->fd) == 0 ? 0 : -errno;
    case kPunchHole:
      return Allocate(job->fd, FALLOC_FL_PUNCH_HOLE, job->offset, job->length);
    case kCopy:
      return Copy(job->from, job->fromOffset, job->fd, job->offset, job->length);
    case kZeroRange:
    case kOperations:
      break;
  }
  return ZeroRange(job->fd, job->offset, job->length);
}

void GuestIo::Complete(double token, int64_t result) {
  completions_.push_back({token, static_cast<double>(result)});
  working_--;
  inbox_->working.fetch_sub(1);
  if (completions_.size() == 1) inbox_->Post(&ready_, 1);
}

napi_value GuestIo::Completions(napi_env env, napi_callback_info info) {
  Arguments arguments(env, info);
  auto* self = static_cast<GuestIo*>(arguments.self);
  uint8_t* bytes;
  size_t length;
  if (!arguments.Bytes(0, &bytes, &length)) return Throw(env, "completions(into)");
  std::lock_guard<std::mutex> lock(self->mutex_);
  std::vector<Completion>& done = self->completions_;
  size_t count = std::min(done.size(), length / sizeof(Completion));
  if (count > 0) memcpy(bytes, done.data(), count * sizeof(Completion));
  done.erase(done.begin(), done.begin() + static_cast<ptrdiff_t>(count));
  return Number(env, static_cast<int64_t>(count));
}

napi_value GuestIo::Cancel(napi_env env, napi_callback_info info) {
  Arguments arguments(env, info);
  auto* self = static_cast<GuestIo*>(arguments.self);
  uint8_t* bytes;
  size_t length;
  if (!arguments.Bytes(0, &bytes, &length)) return Throw(env, "cancel(tokens)");
  auto* tokens = reinterpret_cast<const double*>(bytes);
  std::unordered_set<double> unwanted(tokens, tokens + length / sizeof(double));
  std::lock_guard<std::mutex> lock(self->mutex_);
  auto sweep = [&](std::deque<Job>* jobs) {
    std::deque<Job> kept;
    for (Job& job : *jobs) {
      if (unwanted.count(job.token)) self->Complete(job.token, -ECANCELED);
      else kept.push_back(std::move(job));
    }
    jobs->swap(kept);
  };
  sweep(&self->queue_);
  for (auto& [fd, writes] : self->writes_) sweep(&writes);
  return nullptr;
}

}  // namespace tsvisor

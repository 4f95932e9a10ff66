// Prints src/virtio/generated/virtio.ts from the kernel's user-space headers: feature bits, registers, requests and the
// layout of configuration spaces (virtio 1.2). See scripts/abi/generate.
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_console.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <linux/virtio_types.h>
#include <linux/virtio_vsock.h>
#include <linux/fs.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "print.h"

int main(void) {
  GENERATED();
  COMMENT("Device types (section 5).");
  N(VIRTIO_ID_NET); N(VIRTIO_ID_BLOCK); N(VIRTIO_ID_CONSOLE); N(VIRTIO_ID_RNG); N(VIRTIO_ID_VSOCK);

  COMMENT("Device status (section 2.1) and features of the transport and the rings (section 6), as bit numbers.");
  N(VIRTIO_CONFIG_S_ACKNOWLEDGE); N(VIRTIO_CONFIG_S_DRIVER); N(VIRTIO_CONFIG_S_DRIVER_OK);
  N(VIRTIO_CONFIG_S_FEATURES_OK); N(VIRTIO_CONFIG_S_NEEDS_RESET); N(VIRTIO_CONFIG_S_FAILED);
  N(VIRTIO_F_VERSION_1); N(VIRTIO_RING_F_INDIRECT_DESC); N(VIRTIO_RING_F_EVENT_IDX);

  COMMENT("Split virtqueues (section 2.7).");
  N(VRING_DESC_F_NEXT); N(VRING_DESC_F_WRITE); N(VRING_DESC_F_INDIRECT); N(VRING_USED_F_NO_NOTIFY);
  N(VRING_AVAIL_F_NO_INTERRUPT); N(VRING_DESC_ALIGN_SIZE); N(VRING_AVAIL_ALIGN_SIZE); N(VRING_USED_ALIGN_SIZE);

  COMMENT("Registers of virtio over MMIO (section 4.2.2).");
  N(VIRTIO_MMIO_MAGIC_VALUE); N(VIRTIO_MMIO_VERSION); N(VIRTIO_MMIO_DEVICE_ID); N(VIRTIO_MMIO_VENDOR_ID);
  N(VIRTIO_MMIO_DEVICE_FEATURES); N(VIRTIO_MMIO_DEVICE_FEATURES_SEL); N(VIRTIO_MMIO_DRIVER_FEATURES);
  N(VIRTIO_MMIO_DRIVER_FEATURES_SEL); N(VIRTIO_MMIO_QUEUE_SEL); N(VIRTIO_MMIO_QUEUE_NUM_MAX); N(VIRTIO_MMIO_QUEUE_NUM);
  N(VIRTIO_MMIO_QUEUE_READY); N(VIRTIO_MMIO_QUEUE_NOTIFY); N(VIRTIO_MMIO_INTERRUPT_STATUS);
  N(VIRTIO_MMIO_INTERRUPT_ACK); N(VIRTIO_MMIO_STATUS); N(VIRTIO_MMIO_QUEUE_DESC_LOW); N(VIRTIO_MMIO_QUEUE_DESC_HIGH);
  N(VIRTIO_MMIO_QUEUE_AVAIL_LOW); N(VIRTIO_MMIO_QUEUE_AVAIL_HIGH); N(VIRTIO_MMIO_QUEUE_USED_LOW);
  N(VIRTIO_MMIO_QUEUE_USED_HIGH); N(VIRTIO_MMIO_SHM_LEN_LOW); N(VIRTIO_MMIO_SHM_LEN_HIGH);
  N(VIRTIO_MMIO_SHM_BASE_LOW); N(VIRTIO_MMIO_SHM_BASE_HIGH); N(VIRTIO_MMIO_CONFIG_GENERATION); N(VIRTIO_MMIO_CONFIG);
  N(VIRTIO_MMIO_INT_VRING); N(VIRTIO_MMIO_INT_CONFIG);

  COMMENT("Block device (section 5.2): features, requests, status.");
  N(VIRTIO_BLK_F_SEG_MAX); N(VIRTIO_BLK_F_RO); N(VIRTIO_BLK_F_BLK_SIZE); N(VIRTIO_BLK_F_FLUSH);
  N(VIRTIO_BLK_F_TOPOLOGY); N(VIRTIO_BLK_F_CONFIG_WCE); N(VIRTIO_BLK_F_DISCARD); N(VIRTIO_BLK_F_WRITE_ZEROES);
  N(VIRTIO_BLK_T_IN); N(VIRTIO_BLK_T_OUT); N(VIRTIO_BLK_T_FLUSH); N(VIRTIO_BLK_T_GET_ID); N(VIRTIO_BLK_T_DISCARD);
  N(VIRTIO_BLK_T_WRITE_ZEROES); N(VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP); N(VIRTIO_BLK_S_OK); N(VIRTIO_BLK_S_IOERR);
  N(VIRTIO_BLK_S_UNSUPP); N(VIRTIO_BLK_ID_BYTES);
  BEGIN(virtio_blk_config)
  F(capacity) F(size_max) F(seg_max) F(blk_size) F(physical_block_exp) F(alignment_offset) F(min_io_size) F(opt_io_size)
  F(wce) F(num_queues) F(max_discard_sectors) F(max_discard_seg) F(discard_sector_alignment) F(max_write_zeroes_sectors)
  F(max_write_zeroes_seg) F(write_zeroes_may_unmap)
  END()
  BEGIN(virtio_blk_outhdr) F(type) F(ioprio) F(sector) END()
  BEGIN(virtio_blk_discard_write_zeroes) F(sector) F(num_sectors) F(flags) END()

  COMMENT("Network device (section 5.1).");
  N(VIRTIO_NET_F_CSUM); N(VIRTIO_NET_F_GUEST_CSUM); N(VIRTIO_NET_F_MTU); N(VIRTIO_NET_F_MAC);
  N(VIRTIO_NET_F_GUEST_TSO4); N(VIRTIO_NET_F_GUEST_TSO6); N(VIRTIO_NET_F_GUEST_ECN); N(VIRTIO_NET_F_HOST_TSO4);
  N(VIRTIO_NET_F_HOST_TSO6); N(VIRTIO_NET_F_HOST_ECN); N(VIRTIO_NET_F_MRG_RXBUF); N(VIRTIO_NET_F_STATUS);
  N(VIRTIO_NET_S_LINK_UP); N(VIRTIO_NET_HDR_F_NEEDS_CSUM); N(VIRTIO_NET_HDR_F_DATA_VALID);
  N(VIRTIO_NET_HDR_GSO_NONE); N(VIRTIO_NET_HDR_GSO_TCPV4); N(VIRTIO_NET_HDR_GSO_UDP); N(VIRTIO_NET_HDR_GSO_TCPV6);
  N(VIRTIO_NET_HDR_GSO_ECN);
  BEGIN(virtio_net_config) F(mac) F(status) F(max_virtqueue_pairs) F(mtu) END()
  BEGIN(virtio_net_hdr_v1) F(flags) F(gso_type) F(hdr_len) F(gso_size) F(csum_start) F(csum_offset) F(num_buffers) END()

  COMMENT("Console device (section 5.3).");
  N(VIRTIO_CONSOLE_F_SIZE); N(VIRTIO_CONSOLE_F_MULTIPORT); N(VIRTIO_CONSOLE_F_EMERG_WRITE);
  N(VIRTIO_CONSOLE_DEVICE_READY); N(VIRTIO_CONSOLE_PORT_ADD); N(VIRTIO_CONSOLE_PORT_REMOVE);
  N(VIRTIO_CONSOLE_PORT_READY); N(VIRTIO_CONSOLE_CONSOLE_PORT); N(VIRTIO_CONSOLE_RESIZE); N(VIRTIO_CONSOLE_PORT_OPEN);
  N(VIRTIO_CONSOLE_PORT_NAME);
  BEGIN(virtio_console_config) F(cols) F(rows) F(max_nr_ports) F(emerg_wr) END()
  BEGIN(virtio_console_control) F(id) F(event) F(value) END()

  COMMENT("Socket device (section 5.10).");
  N(VIRTIO_VSOCK_TYPE_STREAM); N(VIRTIO_VSOCK_OP_INVALID); N(VIRTIO_VSOCK_OP_REQUEST); N(VIRTIO_VSOCK_OP_RESPONSE);
  N(VIRTIO_VSOCK_OP_RST); N(VIRTIO_VSOCK_OP_SHUTDOWN); N(VIRTIO_VSOCK_OP_RW); N(VIRTIO_VSOCK_OP_CREDIT_UPDATE);
  N(VIRTIO_VSOCK_OP_CREDIT_REQUEST); N(VIRTIO_VSOCK_SHUTDOWN_RCV); N(VIRTIO_VSOCK_SHUTDOWN_SEND);
  N(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET);
  BEGIN(virtio_vsock_config) F(guest_cid) END()
  BEGIN(virtio_vsock_event) F(id) END()
  BEGIN(virtio_vsock_hdr)
  F(src_cid) F(dst_cid) F(src_port) F(dst_port) F(len) F(type) F(op) F(flags) F(buf_alloc) F(fwd_cnt)
  END()

  COMMENT("Taps (Documentation/networking/tuntap.rst).");
  N(TUNSETIFF); N(TUNGETFEATURES); N(TUNSETOFFLOAD); N(TUNSETVNETHDRSZ); N(TUNSETPERSIST); N(IFF_TAP); N(IFF_NO_PI);
  N(IFF_VNET_HDR); N(IFF_TUN_EXCL); N(TUN_F_CSUM); N(TUN_F_TSO4); N(TUN_F_TSO6); N(TUN_F_TSO_ECN);
  N(IFNAMSIZ); N(SIOCGIFFLAGS); N(SIOCSIFFLAGS); N(SIOCGIFMTU); N(IFF_UP);
  N(AF_INET); N(SOCK_DGRAM); N(SOCK_CLOEXEC); N(O_CLOEXEC); N(EBADFD);
  BEGIN(ifreq) FAS(ifr_ifrn.ifrn_name, "name") FAS(ifr_ifru.ifru_flags, "flags") FAS(ifr_ifru.ifru_mtu, "mtu") END()

  COMMENT("Block devices and reads and writes at an offset.");
  N(BLKGETSIZE64); N(BLKSSZGET); N(BLKPBSZGET); N(RWF_NOWAIT);
  return 0;
}
